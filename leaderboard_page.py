"""Makes leaderboard.py's page, and its table for the terminal, from the rows of leaderboard.json.

    write_page("results", rows, info, rates, short)      # results/leaderboard.html, one file that needs no other
    print(*table(rows, short), sep="\n")

A row is a dict with name, words, metrics and the keys of COLUMNS, or name and failed (why it was not measured).
"""
import base64
import html
import math
import os

from metrics import MEASURES
from rate import curve_name, curves, points_of
from report import AT_LEAST, STYLE, write_whole

# key, heading, unit, format, whether more is better (None: neither)
COLUMNS = [*((name, *(MEASURES[name].heading.split(" ", 1) + [""])[:2], MEASURES[name].style, AT_LEAST.get(name))
             for name in sorted(MEASURES, key=lambda name: (["psnr", "ssim", "lpips"] + [name]).index(name))),
           ("sharpness", "sharpness", "", ".2f", None), ("fid", "FID", "", ".1f", False),
           ("rfvd", "rFVD", "", ".1f", False),
           ("place_first", "first", "dB", ".2f", True), ("place_inner", "inner", "dB", ".2f", True),
           ("place_last", "last", "dB", ".2f", True), ("numbers_per_pixel", "latents", "per pixel", ".4f", False),
           ("bits_per_pixel", "bits", "per pixel", ".4f", False),
           ("entropy_bits_per_pixel", "entropy", "bits/pixel", ".4f", False),
           ("parameters", "weights", "M", ".2f", False),
           ("encode_fps", "encode", "frames/s", ".1f", True), ("decode_fps", "decode", "frames/s", ".1f", True),
           ("peak_memory_mb", "memory", "MB", ".0f", False)]
BITS_OF_A_NUMBER = 16  # bits of a latent's number, as caches store them: float16

PAGE_STYLE = """
body { max-width: 92rem } .plots { display: flex; flex-wrap: wrap; gap: 1.5rem } svg { max-width: 100%; height: auto }
svg text { fill: var(--ink); font: 12px system-ui, "Segoe UI", "Noto Sans", "Liberation Sans", Arial, sans-serif }
svg .soft { fill: var(--soft) } svg .grid { stroke: var(--rule); stroke-width: 1 } svg .small { font-size: 10px }
th[data-key] { cursor: pointer } th[aria-sort] { text-decoration: underline } .best { font-weight: 700 }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em }
.together { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; margin: 1rem 0 }
.rates table { width: auto; min-width: 30rem; margin-bottom: 1rem }
.controls { display: flex; gap: 1rem; align-items: center } .controls input { flex: 1; max-width: 24rem }
"""
COLOURS = ["#2a78c8", "#d8601c", "#2b9a5b", "#b03a8c", "#8a6d1d", "#6450c8", "#12929c", "#c33c3c", "#6d7a86", "#7a9a12"]

LEGEND = ("A click on a heading sorts. Flicker: mean absolute error of the changes from frame to frame. First, inner, "
          "last: frames by their place among those that one latent stands for, the PSNR of their MSE. Bits per pixel: "
          "of codecs as written, of tokenizers with each code written plainly. Memory: of one clip, with the weights.")

SCRIPT = """
for (const head of document.querySelectorAll("th[data-key]")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const up = head.ariaSort ? head.ariaSort === "descending" : head.dataset.up === "1";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.ariaSort = up ? "ascending" : "descending";
  const value = row => { const text = row.cells[column]?.dataset.value;
    return text === "" || text === undefined ? null : column ? Number(text) : text; };
  const rows = [...body.rows].sort((a, b) => { const x = value(a), y = value(b);
    if (x === null || y === null) return (x === null) - (y === null);
    return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1); });
  body.append(...rows);
};
const videos = [...document.querySelectorAll(".together video")], play = document.getElementById("play");
const place = document.getElementById("place"), speed = document.getElementById("speed");
if (videos.length) {
  const lead = videos[0];
  for (const v of videos) v.playbackRate = Number(speed.value);
  const start = () => { for (const v of videos) {
    v.currentTime = 0; v.playbackRate = Number(speed.value); v.play(); } };
  lead.onended = start;
  lead.ontimeupdate = () => { if (lead.duration && !lead.paused) place.value = lead.currentTime / lead.duration; };
  play.onclick = () => { if (lead.paused) start(); else for (const v of videos) v.pause();
    play.textContent = lead.paused ? "play" : "pause"; };
  speed.onchange = () => { for (const v of videos) v.playbackRate = Number(speed.value); };
  place.oninput = () => { for (const v of videos) { v.pause(); v.currentTime = place.value * (v.duration || 0); }
    play.textContent = "play"; };
}
"""


def value_of(row, key):
    """A row's value in a column (parameters in millions), or None."""
    value = row.get("metrics", {}).get(key, row.get(key))
    return value / 1e6 if key == "parameters" and value is not None else value


def shown_columns(rows):
    """The columns in which some row has a value; and LPIPS, since a note says why it is missing."""
    return [column for column in COLUMNS
            if column[0] == "lpips" or any(value_of(row, column[0]) is not None for row in rows)]


def table(rows, short):
    """Lines for a terminal."""
    columns, wide = shown_columns(rows), max(len(short(row["name"])) for row in rows)
    cells = [[f"{heading} {unit}".strip() for _, heading, unit, *_ in columns]]
    cells += [["-" if (value := value_of(row, key)) is None else f"{value:{style}}" for key, _, _, style, _ in columns]
              for row in rows]
    sizes = [2 + max(map(len, column)) for column in zip(*cells)]
    lines = [" " * wide + "".join(f"{head:>{size}}" for head, size in zip(cells[0], sizes))]
    for row, texts in zip(rows, cells[1:]):
        values = f"  failed: {row['failed']}" if row.get("failed") else "".join(
            f"{text:>{size}}" for text, size in zip(texts, sizes))
        lines.append(f"{short(row['name']):{wide}}{values}")
    return lines


# ---- plots -----------------------------------------------------------------------------------------------------------


def ticks(low, high, log):
    """Positions of an axis' ticks from low to high: if `log`, 1, 2, 5 of each decade, else about five evenly spaced."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        some = [m * 10.0 ** d for d in decades for m in ((1, 2, 5) if len(decades) < 4 else (1,))]
        return [tick for tick in some if low <= tick <= high]
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-9) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def plot(series, x_name, y_name, width=620, height=400, labels=True):
    """An SVG plot of series {"name", "colour", "points": [(x, y)], "hollow"}: dots, joined by lines, with the name
    beside a series' last dot. The x axis is logarithmic."""
    points = [point for one in series for point in one["points"]]
    if not points:
        return ""
    left, right, top, bottom = 52, 16, 14, 42

    xs, ys = zip(*points)
    margin = 0.08 * (max(ys) - min(ys)) or 1
    x0, x1, y0, y1 = min(xs) / 1.25, max(xs) * 1.25, min(ys) - margin, max(ys) + margin

    def at(x, y):
        return (left + math.log(x / x0) / math.log(x1 / x0) * (width - left - right),
                height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom))

    svg = f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{y_name} over {x_name}">'
    for tick in ticks(x0, x1, log=True):
        x, _ = at(tick, y0)
        svg += (f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>'
                f'<text class="soft" x="{x:.1f}" y="{height - bottom + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in ticks(y0, y1, log=False):
        _, y = at(x0, tick)
        svg += (f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="soft" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    svg += (f'<text class="soft" x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">{x_name}</text>'
            f'<text class="soft" x="12" y="{(top + height - bottom) / 2}" text-anchor="middle" '
            f'transform="rotate(-90 12 {(top + height - bottom) / 2})">{y_name}</text>')
    taken = [at(*point) for point in points]
    for one in series:
        points = sorted(one["points"], key=lambda point: point[1])  # from the lowest quality to the best
        spots = [at(*point) for point in points]
        if len(spots) > 1:
            svg += (f'<polyline fill="none" stroke="{one["colour"]}" stroke-width="2" points="'
                    + " ".join(f"{x:.1f},{y:.1f}" for x, y in spots) + '"/>')
        fill = "none" if one.get("hollow") else one["colour"]
        for (x, y), (a, b) in zip(spots, points):
            svg += (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{one["colour"]}" stroke-width="2">'
                    f'<title>{html.escape(one["name"])}: {a:.4g}, {b:.2f}</title></circle>')
        if labels:
            x, y = spots[-1]
            long = 6.6 * len(one["name"])
            anchor, x = ("end", x - 9) if x + long > width - right else ("start", x + 9)
            middle = x - long / 2 if anchor == "end" else x + long / 2
            shifts = (4, -10, 18, -24, 32, -38, 46)
            y += next((s for s in shifts if all(abs(y + s - 4 - b) > 11 or abs(middle - a) > long / 2 + 8
                                                for a, b in taken if (a, b) != spots[-1])), 4)
            taken += [(middle + k * long / 4, y - 4) for k in (-2, -1, 0, 1, 2)]
            svg += f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(one["name"])}</text>'
    return svg + "</svg>"


def series_of(rows, colours, short, point, hollow=lambda row: False):
    """A series for each model; all rates of a codec, or levels of a tokenizer, are one series. point(row): (x, y), or
    None for no point."""
    found = {}
    for row in rows:
        spot = None if row.get("failed") else point(row)
        if spot and None not in spot and spot[0] > 0:
            family = curve_name(row) or row["name"]
            one = found.setdefault(family, dict(name=short(family), colour=colours[family], points=[],
                                                hollow=hollow(row)))
            one["points"].append(spot)
    return list(found.values())


def speed_point(row):
    """(frames per second of encoding and decoding together, PSNR), or None."""
    there, back = row["encode_fps"], row["decode_fps"]
    return (1 / (1 / there + 1 / back), row["metrics"]["psnr"]) if there and back else None


def size_point(row):
    """(bits per pixel, PSNR); latents without codes count as float16."""
    bits = row["bits_per_pixel"] or BITS_OF_A_NUMBER * (row["numbers_per_pixel"] or 0)
    return (bits, row["metrics"]["psnr"])


# ---- the page --------------------------------------------------------------------------------------------------------


def html_table(rows, colours, short):
    """The HTML table, which a click on a heading sorts; the best value of each column is marked. short(name): the name
    as shown."""
    columns = shown_columns(rows)
    best = {}
    for key, *_, style, more in columns:
        known = [value for row in rows if (value := value_of(row, key)) is not None]
        if len(known) > 1 and more is not None:
            best[key] = f"{(max if more else min)(known):{style}}"
    page = '<div class="scroll"><table><thead><tr><th class="name" data-key="name" data-up="1">model</th>'
    page += "".join(f'<th data-key="{key}" data-up="{int(more is False)}">{html.escape(heading)}<small>'
                    f'{unit or "&nbsp;"}</small></th>' for key, heading, unit, _, more in columns)
    page += "</tr></thead><tbody>"
    for row in rows:
        name = html.escape(row["name"])
        dot = f'<span class="dot" style="background:{colours[curve_name(row) or row["name"]]}"></span>'
        page += f'<tr><td class="name" data-value="{name}" title="{name}">{dot}{html.escape(short(row["name"]))}'
        if row.get("failed"):
            page += (f'</td><td class="name alarm" colspan="{len(columns)}">not measured: {html.escape(row["failed"])}'
                     "</td></tr>")
            continue
        page += f'<small>{html.escape(row["words"])}</small></td>'
        for key, *_, style, _ in columns:
            value = value_of(row, key)
            text = "–" if value is None else f"{value:{style}}"
            mark = ' class="best"' if text == best.get(key) else ""
            page += f'<td{mark} data-value="{"" if value is None else value}">{text.replace("-", "−")}</td>'
        page += "</tr>"
    return page + "</tbody></table></div>"


def embedded(out, path):
    """A video file under out/ as a data URL."""
    with open(os.path.join(out, path), "rb") as file:
        return "data:video/webm;base64," + base64.b64encode(file.read()).decode()


def html_videos(out, rows, info, short):
    """HTML of the shown clip: the original, and each model's reconstruction."""
    small = " small" if info["width"] <= 320 else ""
    cells = [("original", "", info["original"])]
    cells += [(short(row["name"]), f'{row["clips"][info["show"]]["psnr"]:.2f} dB', row["video"])
              for row in rows if not row.get("failed")]
    page = ('<div class="controls"><button id="play">pause</button><label>speed <select id="speed"><option>1</option>'
            '<option>0.5</option><option selected>0.25</option><option>0.1</option></select></label>'
            '<input id="place" type="range" min="0" max="1" step="any" value="0" aria-label="place"></div>'
            f'<div class="together videos{small}">')
    for name, words, path in cells:
        page += (f'<figure><figcaption>{html.escape(name)} {words}</figcaption><video muted playsinline autoplay '
                 f'preload="auto" src="{embedded(out, path)}"></video></figure>')
    return page + "</div>"


def html_rates(rows, rates, colours, short):
    """HTML of the BD-rates, and of the curves of PSNR over bits per pixel, for the mean and for each clip."""
    found = curves(rows)
    if not found:
        return ""
    text = "<h2>Rate and distortion</h2>"
    if rates:
        first = html.escape(short(rates["against"]))
        text += (f"<p>BD-rate: how many percent of bits more (+) or fewer (−) than {first} for the same PSNR, over "
                 "the PSNRs that both reach (Bjontegaard, piecewise cubic).</p>")
        names = [clip["name"] for clip in next(iter(found.values()))[0]["clips"]]
        heads = "".join(f"<th>{html.escape(short(name))}</th>" for name in rates["curves"])
        text += '<div class="scroll rates"><table><thead><tr><th class="name">clip</th>'
        text += f"{heads}</tr></thead><tbody>"
        lines = [(name, [one["clips"][i] for one in rates["curves"].values()]) for i, name in enumerate(names)]
        lines += [("mean of the clips that have one", [one["mean"] for one in rates["curves"].values()]),
                  ("of the mean curves", [one["of_mean"] for one in rates["curves"].values()])]
        for name, values in lines:
            cells = "".join("<td>–</td>" if value is None else f"<td>{value:+.1f} %</td>".replace("-", "−")
                            for value in values)
            text += f'<tr><td class="name">{html.escape(name)}</td>{cells}</tr>'
        text += "</tbody></table></div>"

    def lines_of(clip):
        return [dict(name=short(name), colour=colours[name], points=points) for name, some in found.items()
                if (points := [point for point in points_of(some, clip) if None not in point and point[0] > 0])]

    text += f'<figure><figcaption>mean over the clips</figcaption>{plot(lines_of(None), "bits per pixel", "PSNR, dB")}'
    text += '</figure><div class="plots">'
    clips = next(iter(found.values()))[0]["clips"]
    for i, clip in enumerate(clips[:24]):
        text += (f'<figure><figcaption>{html.escape(clip["name"])}</figcaption>'
                 f'{plot(lines_of(i), "bits per pixel", "PSNR, dB", 340, 240, labels=False)}</figure>')
    return text + "</div>" + f"<p class=soft>The first 24 of {len(clips)} clips.</p>" * (len(clips) > 24)


def write_page(out, rows, info, rates, short):
    """Writes out/leaderboard.html. info: the "info" of leaderboard.json; rates: from rate.compare_rates."""
    families = dict.fromkeys(curve_name(row) or row["name"] for row in rows)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(families)}
    judged, frames = info["judged"], info["frames"]
    title = f"Leaderboard of {len(rows)} models over {info['clips']} clips"
    facts = {"clips": f"{info['clips']} of {info['data']}, {frames} frames of {info['height']} × {info['width']}",
             "judged": f"frames {info['judged_words']} of each clip, numbered from 0"
                       + (f": those that all models return; {info['fewest']} returns fewest" if len(judged) < frames
                          else ": all models return all of them"),
             "protocol": info["protocol"] + " (a part of it: --clips, --frames or --size changed it)" * info["changed"],
             "machine": f"{info['machine']}, {info['precision']}", "command": info["command"],
             "created": info["created"]}
    facts = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items() if text)
    notes = "".join(f'<p class="soft">{html.escape(note)}</p>' for note in info["notes"])
    speed = plot(series_of(rows, colours, short, speed_point), "frames/s, there and back", "PSNR, dB")
    size = plot(series_of(rows, colours, short, size_point, lambda row: row["bits_per_pixel"] is None),
                "bits per pixel", "PSNR, dB")
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}{PAGE_STYLE}</style>'
            f"</head><body><h1>{title}</h1><dl>{facts}</dl>{html_table(rows, colours, short)}"
            f'<p class="soft">{LEGEND}</p>{notes}<h2>Quality against speed and size</h2>'
            f'<div class="plots">{speed}{size}</div>'
            f'<p class="soft">Hollow: latents as they are, {BITS_OF_A_NUMBER} bits each, not compressed further.</p>'
            f"{html_rates(rows, rates, colours, short)}<h2>{html.escape(info['shown'])}, side by side</h2>"
            '<p class="soft">These videos are compressed once more, by VP8.</p>'
            f"{html_videos(out, rows, info, short)}<script>{SCRIPT}</script></body></html>\n")
    write_whole(os.path.join(out, "leaderboard.html"), page.encode("utf-8", "replace"))
