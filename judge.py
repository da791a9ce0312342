"""What the inputs of a report say together: mean and deviation, the ratio to a teacher, targets met or missed, and the
table for a terminal. Rows are those of `report.write_report`. Needs numpy only.
"""
import math

import numpy as np

TARGETS = "mse=0.005,psnr=25,ssim=0.85"
AT_LEAST = {"mse": False, "lpips": False, "psnr": True, "ssim": True}  # else a target is "at most"
HEADINGS = {"mse": "MSE", "psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS"}

# key, heading, width, format of the value; of its ratio to a teacher's for all but the PSNR, whose difference is shown
COLUMNS = [("frames", "frames", 7, ".0f"), ("mse", "MSE", 9, ".5f"), ("psnr", "PSNR dB", 9, ".2f"),
           ("ssim", "SSIM", 8, ".4f"), ("lpips", "LPIPS", 8, ".4f"), ("seconds", "seconds", 9, ".2f"),
           ("encode_fps", "encode f/s", 11, ".1f"), ("decode_fps", "decode f/s", 11, ".1f"),
           ("peak_memory_mb", "peak MB", 9, ".0f")]


def parse_targets(text):
    """"mse=0.005,psnr=25" -> {"mse": 0.005, "psnr": 25.0}; "none" -> {}. ValueError for another name or value."""
    if text.strip() == "none":
        return {}
    targets = {}
    for part in text.split(","):
        name, sign, value = (word.strip() for word in part.partition("="))
        if name not in AT_LEAST or not sign:
            raise ValueError(f"{part.strip()!r} is none of {'=..., '.join(AT_LEAST)}=..., nor is all of it 'none'")
        try:
            targets[name] = float(value)
        except ValueError:
            raise ValueError(f"{part.strip()!r}: {value!r} is no number") from None
        if not math.isfinite(targets[name]) or targets[name] < 0:
            raise ValueError(f"{part.strip()!r}: a number of 0 or more is wanted")
    return targets


def in_words(targets):
    """{"psnr": 25.0, ...} -> "PSNR ≥ 25, ..."."""
    return ", ".join(f"{HEADINGS[key]} {'≥' if AT_LEAST[key] else '≤'} {target:g}" for key, target in targets.items())


def judge(targets, values):
    """{metric: {"target", "value", "met"}} for the targets whose metric has a value."""
    return {key: {"target": target, "value": values[key],
                  "met": bool(values[key] >= target if AT_LEAST[key] else values[key] <= target)}
            for key, target in targets.items() if values.get(key) is not None}


def verdict(judged):
    """"met", "missed PSNR, SSIM", or "" where nothing was judged."""
    missed = [HEADINGS[key] for key, one in judged.items() if not one["met"]]
    return f"missed {', '.join(missed)}" if missed else "met" if judged else ""


def values(rows, key):
    """The finite values of a quantity, which stands among a row's metrics or beside them."""
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
    """The "summary" of metrics.json: of all rows, with those that failed."""
    done = [row for row in rows if not row.get("failed")]
    teachers = [row["teacher"] for row in done if row.get("teacher")]
    ours = statistics(done, keys)
    return {"inputs": len(rows), "failed": len(rows) - len(done), "ours": ours,
            "teacher": statistics(teachers, keys) if teachers else None,
            "versus_teacher": versus(done, keys) if teachers else None,
            "targets": judge(targets, {key: ours[key]["mean"] for key in targets if key in ours}),
            "inputs_that_met_targets": sum(verdict(row.get("targets", {})) == "met" for row in done)}


def table(rows, targets):
    """Lines for a terminal: a row for each input, its teacher and their ratio; the last are mean ± deviation."""
    done, keys = [row for row in rows if not row.get("failed")], [key for key, *_ in COLUMNS]
    wide = max(len("mean ± deviation"), *(min(30, len(row["name"])) for row in rows))

    def line(name, cells, last=""):
        cells = "".join(f"{cell:>{width}}" for cell, (*_, width, _) in zip(cells, COLUMNS))
        return f"{name[:wide]:{wide}}{cells}  {last}".rstrip()

    def cells(quantities, prefix=""):
        return ["-" if quantities[key] is None else f"{prefix}{quantities[key]:{style}}" for key, *_, style in COLUMNS]

    def against_teacher(some):
        found = versus(some, keys)
        return line("  ours / its", ["" if key == "frames" else "-" if found[key] is None else f"{found[key]:+.2f}"
                                     if key == "psnr" else f"{found[key]:.2f}x" for key in keys])

    lines = [line("", [heading for _, heading, *_ in COLUMNS], "targets" if targets else "")]
    for row in rows:
        if row.get("failed"):
            lines.append(f"{row['name'][:wide]:{wide}} failed: {row['failed']}")
            continue
        lines.append(line(row["name"], cells({key: row["metrics"].get(key, row.get(key)) for key in keys}),
                          verdict(row["targets"])))
        if row.get("teacher"):
            its = {**row["teacher"], **row["teacher"]["metrics"], "frames": None}
            lines += [line("  its teacher", ["", *cells(its)[1:]]), against_teacher([row])]
        if row.get("latent_error") is not None:
            lines.append(f"  latent error {row['latent_error']:.4g} ({100 * row['relative_latent_error']:.1f} % of the "
                         "teacher's variance)")
    if not done:
        return lines
    summary = summarize(rows, keys, targets)
    last = verdict(summary["targets"])
    last += f" ({summary['inputs_that_met_targets']} of {len(done)} met)" if last and len(done) > 1 else ""
    lines.append(line("mean ± deviation", cells({key: one["mean"] for key, one in summary["ours"].items()}), last))
    if len(done) > 1:
        lines.append(line("", cells({key: one["std"] for key, one in summary["ours"].items()}, "±")))
    if summary["teacher"]:
        its = cells({key: one["mean"] for key, one in summary["teacher"].items()})
        lines += [line("  its teacher", ["", *its[1:]]), against_teacher(done)]
    return lines
