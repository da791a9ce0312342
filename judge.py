"""Parses the quality targets of a command line, and prints results as a table on the terminal. Rows are those of
`report.write_report`. Needs report.py and metrics.py.
"""
import math

from metrics import MEASURES
from report import AT_LEAST, summarize, verdict, versus

TARGETS = "mse=0.005,psnr=25,ssim=0.85"

# key, heading, width, format of the value
COLUMNS = [("frames", "frames", 7, ".0f"),
           *((name, measure.heading, 2 + max(len(measure.heading), len(f"{0:{measure.style}}")), measure.style)
             for name, measure in MEASURES.items()),
           ("seconds", "seconds", 9, ".2f"), ("encode_fps", "encode f/s", 11, ".1f"),
           ("decode_fps", "decode f/s", 11, ".1f"), ("peak_memory_mb", "peak MB", 9, ".0f")]


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


def table(rows, targets):
    """Lines for a terminal: for each input our values, the teacher's, and ours against the teacher's (the difference
    for PSNR, else the ratio); then mean ± deviation over the inputs."""
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
