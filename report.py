"""metrics.json and summary_report.html for a run over some videos.

    write_report("out", rows, info)                        # out/metrics.json, out/summary_report.html

This file works alone with numpy. The report shows the videos of video_writer.py and the pictures of pictures.py, if
they are there.
"""
import html
import json
import math
import os
import re
import unicodedata
import urllib.parse

import numpy as np


def safe_name(path, taken):
    """A short name for an input's output files that every file system takes, and that is not in the set `taken`; adds
    it there, in lower case. `x.mp4`, then `other/x.mp4`, give x and x_2. Letters of any script stay. No two names
    differ in case alone."""
    stem = os.path.splitext(os.path.basename(os.path.normpath(path)))[0]
    stem = unicodedata.normalize("NFC", stem.encode("utf-8", "replace").decode())
    stem = re.sub(r"[^\w.-]+", "_", stem).strip("._-").encode()[:120].decode("utf-8", "ignore") or "input"
    name, number = stem, 1
    while name.casefold() in taken:
        number += 1
        name = f"{stem}_{number}"
    taken.add(name.casefold())
    return name


# key, heading, unit, number format
QUANTITIES = [("psnr", "PSNR", "dB", ".2f"), ("ssim", "SSIM", "", ".4f"), ("lpips", "LPIPS", "", ".4f"),
              ("mse", "MSE", "", ".2e"), ("encode_seconds", "encode", "s", ".3f"),
              ("decode_seconds", "decode", "s", ".3f"), ("encode_fps", "encode", "frames/s", ".1f"),
              ("decode_fps", "decode", "frames/s", ".1f"), ("peak_memory_mb", "peak memory", "MB", ".0f"),
              ("latent_error", "latent error", "ours to its", ".4g")]

# Whether a target means "at least" (more is better) or "at most".
AT_LEAST = {"mse": False, "lpips": False, "psnr": True, "ssim": True, "flicker": False}
HEADINGS = {"mse": "MSE", "psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "flicker": "flicker"}

STYLE = """
:root { color-scheme: light dark; --ink: #1b1c1e; --soft: #5d6167; --rule: #d5d8dc; --paper: #fff; --alarm: #a3281f;
  --met: #1d6b35 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e5e7; --soft: #9da2a9; --rule: #3a3d42; --paper: #151618; --alarm: #f0887f; --met: #7cc993 }
  a { color: #86b4ef } }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 78rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, "Segoe UI", "Noto Sans", "Liberation Sans", Arial, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem } p { margin: .4rem 0 }
.soft, figcaption, small, dt { color: var(--soft) } .alarm { color: var(--alarm) } .met { color: var(--met) }
small { display: block }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.5rem; margin: 1.2rem 0 } dd { margin: 0 }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; border-block: 2px solid; font-size: .93em }
th, td { padding: .35rem .5rem; text-align: right; vertical-align: top; white-space: nowrap; overflow-wrap: normal }
td { font-variant-numeric: tabular-nums } tbody { border-top: 1px solid var(--rule) } .name { text-align: left }
td.name:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 9rem } figure { margin: 0 }
.videos { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem;
  margin: 1rem 0 } .wide { grid-column: 1 / -1 } img { max-width: 100% } .small video { image-rendering: pixelated }
video { display: block; width: 100%; max-height: 80vh; background: #000 }
"""


# ---- statistics over the inputs, targets met or missed --------------------------------------------------------------


def in_words(targets):
    """{"psnr": 25.0, ...} -> "PSNR ≥ 25, ..."."""
    return ", ".join(f"{HEADINGS[key]} {'≥' if AT_LEAST[key] else '≤'} {target:g}"
                     for key, target in targets.items())


def judge(targets, values):
    """{metric: {"target", "value", "met"}} for the targets whose metric has a value."""
    return {key: {"target": target, "value": values[key],
                  "met": bool(values[key] >= target if AT_LEAST[key] else values[key] <= target)}
            for key, target in targets.items() if values.get(key) is not None}


def verdict(judged):
    """"met", "missed PSNR, SSIM", or "" if nothing was judged."""
    missed = [HEADINGS[key] for key, one in judged.items() if not one["met"]]
    return f"missed {', '.join(missed)}" if missed else "met" if judged else ""


def values(rows, key):
    """The finite values of a quantity, which is a key of a row's metrics or of the row itself."""
    found = [row["metrics"].get(key, row.get(key)) for row in rows]
    return [float(value) for value in found if value is not None and math.isfinite(value)]


def statistics(rows, keys):
    """{key: mean, sample standard deviation (None for one value), count}, over the rows with a finite value."""
    return {key: {"mean": float(np.mean(found)) if found else None,
                  "std": float(np.std(found, ddof=1)) if len(found) > 1 else None, "count": len(found)}
            for key in keys for found in [values(rows, key)]}


def versus(rows, keys):
    """{key: mean of ours minus (PSNR) or divided by the teacher's, over the rows that have both; None without any}"""
    result = {}
    for key in keys:
        both = [row for row in rows if row.get("teacher") and values([row], key) and values([row["teacher"]], key)]
        ours, theirs = sum(values(both, key)), sum(values([row["teacher"] for row in both], key))
        result[key] = (ours - theirs) / len(both) if both and key == "psnr" else ours / theirs if theirs else None
    return result


def summarize(rows, keys, targets):
    """The "summary" of metrics.json, from all rows; failed ones are only counted."""
    done = [row for row in rows if not row.get("failed")]
    teachers = [row["teacher"] for row in done if row.get("teacher")]
    ours = statistics(done, keys)
    return {"inputs": len(rows), "failed": len(rows) - len(done), "ours": ours,
            "teacher": statistics(teachers, keys) if teachers else None,
            "versus_teacher": versus(done, keys) if teachers else None,
            "targets": judge(targets, {key: ours[key]["mean"] for key in targets if key in ours}),
            "inputs_that_met_targets": sum(verdict(row.get("targets", {})) == "met" for row in done)}


# ---- the page ------------------------------------------------------------------------------------------------------


def strict(value, where="", lost=None):
    """A copy of `value` that strict JSON and UTF-8 can hold. NaN and infinity become None; if `lost` is a list, a note
    on each is appended to it. where: the path of keys to `value`, for these notes."""
    if isinstance(value, dict):
        return {str(key): strict(item, f"{where}{key} ", lost) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [strict(item, where, lost) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not math.isfinite(value):
        if lost is not None:
            lost.append(f"{where}is {value}; null in metrics.json")
        return None
    if isinstance(value, (str, os.PathLike)):  # a file name's undecodable bytes are lone surrogates in Python
        return os.fspath(value).encode("utf-8", "replace").decode()
    return value


def write_whole(path, content):
    """Writes a text or bytes through a temporary file, so that `path` is always complete. After an OSError nothing is
    left behind."""
    try:
        with open(f"{path}.part", "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.part", path)
    except OSError:  # a full disk
        if os.path.exists(f"{path}.part"):
            os.remove(f"{path}.part")
        raise


def _url(path):
    return urllib.parse.quote(os.fsencode(os.fspath(path).replace(os.sep, "/")))  # quotes ":" too, so never a scheme


def _cells(rows, quantities, judged=()):
    """HTML for each quantity: its value, or for several rows mean ± deviation, and the number of rows with a value if
    some have none. Values that miss their target are marked."""
    texts = []
    for key, _, _, style in quantities:
        mean, std, count = statistics(rows, [key])[key].values()
        if mean is None:
            texts.append("∞" if any(row["metrics"].get(key) == math.inf for row in rows) else "–")
        else:
            text = f"{mean:{style}}" + (f"<small>± {std:{style}}</small>" if std is not None else "")
            text += f"<small>{count} of {len(rows)}</small>" if count < len(rows) else ""
            missed = key in judged and not judged[key]["met"]
            text = text.replace("-", "−")
            texts.append(f'<span class="alarm">{text}</span>' if missed else text)
    return texts


def _verdict(judged, more=""):
    """HTML of targets met or missed."""
    word, _, which = verdict(judged).partition(" ")
    lines = "".join(f"<small>{text}</small>" for text in (which, more) if text)
    return f'<span class="{"alarm" if word == "missed" else "met"}">{word or "–"}</span>{lines}'


def _table(first, quantities, groups):
    """HTML of a table. first: heading of the first column. groups: (HTML of the first cell, rows, judged targets, a
    remark on them), where rows are one input's row, or several to be averaged."""
    with_teacher = any(row.get("teacher") for _, rows, *_ in groups for row in rows)
    with_targets = any(judged for *_, judged, _ in groups)
    names = [first] + ["targets"] * with_targets + ["model"] * with_teacher
    page = '<div class="scroll"><table><thead><tr>' + "".join(f'<th class="name">{name}</th>' for name in names)
    page += "".join(f"<th>{html.escape(name)}<small>{unit}</small></th>" for _, name, unit, _ in quantities)
    page += "</tr></thead>"
    for cell, rows, judged, more in groups:
        lines = {"ours": _cells(rows, quantities, judged)}
        teachers = [row["teacher"] for row in rows if row.get("teacher")]
        if teachers:
            lines["teacher"] = _cells(teachers, quantities)
            ratios = versus(rows, [key for key, *_ in quantities])
            lines["ours vs teacher"] = ["–" if value is None else f"{value:+.2f}".replace("-", "−") if key == "psnr"
                                        else f"{value:.2f}×" for key, value in ratios.items()]
        body = [(f'<td class="name">{model}</td>' if with_teacher else "") + "".join(f"<td>{x}</td>" for x in texts)
                for model, texts in lines.items()]
        first = [cell, _verdict(judged, more)] if with_targets else [cell]
        first = "".join(f'<td class="name" rowspan="{len(body)}">{text}</td>' for text in first)
        page += f'<tbody><tr>{first}{"</tr><tr>".join(body)}</tr></tbody>'
    return page + "</table></div>"


def _section(number, row, clean):
    """HTML of one input. clean: the row as in metrics.json; exact paths are taken from `row`."""
    name = html.escape(clean["name"])
    text = f'<h2 id="input-{number}">{name}</h2><p class="soft">{html.escape(clean["source"])}'
    if row.get("failed"):
        return text + f'</p><p class="alarm">{html.escape(clean["failed"])}</p>'
    text += (f': {row["frames"]} frames of {row["width"]} × {row["height"]} at {row["fps"] or math.nan:.4g} frames/s, '
             f'latents {" × ".join(str(size) for size in row["latent_shape"])}</p>')
    text += "".join(f"<p>{html.escape(note)}</p>" for note in clean["notes"])
    text += f'<div class="videos{" small" if row["width"] <= 320 else ""}">'
    for label, path in row.get("videos", {}).items():
        wide = " class=wide" if label == "comparison" else ""
        text += (f'<figure{wide}><figcaption>{html.escape(label)}</figcaption>'
                 f'<video controls loop muted playsinline preload="metadata" src="{_url(path)}"></video></figure>')
    if row.get("latent_picture"):
        text += f'<img class="wide" src="{_url(row["latent_picture"])}" alt="latents of {name}" loading="lazy">'
    return text + "</div>"


def write_report(out_dir, rows, info, targets=None, headings=None):
    """Writes out_dir/metrics.json and out_dir/summary_report.html (self-contained); returns the path of the latter.

    rows: a dict for each input: name, source, frames, fps, height, width, latent_shape, metrics (psnr in dB, ssim,
    lpips, mse and any others; None if not computed), encode_seconds, decode_seconds, encode_fps, decode_fps,
    peak_memory_mb, notes (list of str), videos ({label: path relative to out_dir}), latent_picture (such a path or
    None). An input that could not be read has only name, source and failed (the reason). row["teacher"], if present,
    holds a teacher's metrics, times, memory and latent_error; the tables then show our values, the teacher's, and ours
    against the teacher's: the difference for PSNR, the ratio for the others. targets: from `judge.parse_targets` (file
    judge.py); row["targets"]: the result of `judge` for a row. headings: {metric: heading} for metrics that
    `QUANTITIES` lacks; the heading None leaves a metric out of the tables.
    info: {what: text} about the run (checkpoint, model, device, ...), shown in this order; its lpips_note, a sentence,
    says why LPIPS is missing.
    metrics.json: info, rows and summary (mean, sample standard deviation, count of finite values; targets, judged on
    the means). NaN and infinity are null there, and named in the row's notes. OSError if a file cannot be written.
    """
    done = [row for row in rows if not row.get("failed")]
    teachers = [row["teacher"] for row in done if row.get("teacher")]
    others = sorted({key for row in done for key in row["metrics"]} - {key for key, *_ in QUANTITIES})
    quantities = QUANTITIES[:4] + [(key, (headings or {}).get(key, key), "", ".4g") for key in others] + QUANTITIES[4:]
    quantities = quantities if teachers else quantities[:-1]
    if not values(done + teachers, "lpips"):
        quantities = [quantity for quantity in quantities if quantity[0] != "lpips"]  # the note says why
    summary = summarize(rows, [key for key, *_ in quantities] + ["seconds"], targets or {})
    quantities = [quantity for quantity in quantities if quantity[1] is not None]
    clean_rows = []
    for row in rows:
        lost = []
        clean = strict(row, "", lost)
        clean_rows.append({**clean, "notes": clean.get("notes", []) + lost})
    clean_info = strict(info)
    os.makedirs(out_dir, exist_ok=True)
    content = {"info": clean_info, "summary": summary, "rows": clean_rows}
    write_whole(os.path.join(out_dir, "metrics.json"), json.dumps(content, indent=2, allow_nan=False) + "\n")

    title = html.escape(f"Reconstructions by {clean_info.get('model', 'a video autoencoder')}")
    facts = "".join(f"<dt>{html.escape(what)}</dt><dd>{html.escape(str(value))}</dd>"
                    for what, value in clean_info.items() if what != "lpips_note")
    inputs, sections, failures = [], "", ""
    for number, (row, clean) in enumerate(zip(rows, clean_rows), 1):
        link = f'<a href="#input-{number}">{html.escape(clean["name"])}</a>'
        sections += _section(number, row, clean)
        if row.get("failed"):
            failures += f'<p class="alarm">{link}: {html.escape(clean["failed"])}</p>'
        else:
            inputs.append((link, [row], row.get("targets", {}), ""))
    met = f"{summary['inputs_that_met_targets']} of {len(done)} met" if len(done) > 1 else ""
    if len(done) > 1:
        inputs.append(("mean ± deviation", done, summary["targets"], met))
    legend = "Mean ± sample standard deviation"
    if teachers:
        legend += "; ours vs teacher: difference for PSNR, ratio for the others, over the inputs that have both"
    if targets:
        legend += f". Targets: {in_words(targets)}, judged on the means and on each input"
    if clean_info.get("lpips_note"):
        legend += f'. {html.escape(clean_info["lpips_note"])}'
    path = os.path.join(out_dir, "summary_report.html")
    write_whole(
        path, f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
              f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
              f'<h1>{title}</h1><dl>{facts}</dl><h2>Summary</h2>'
              f'{_table("inputs", quantities, [(f"{len(done)} of {len(rows)}", done, summary["targets"], met)])}'
              f'<p class="soft">{legend}. '
              f'<a href="metrics.json">metrics.json</a></p><h2>Inputs</h2>'
              f'{_table("input", quantities, inputs)}{failures}{sections}</body></html>\n')
    return path
