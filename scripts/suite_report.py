"""What a suite's results say: tables, a plot, a comparison, and pages of the clone."""

import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/speed.md")
PASSES = {"train": "training step", "forward": "inference"}
PEERS = (
    ("literal", "plain Flax"),
    ("timm eager", "timm"),
    ("timm compiled", "timm compiled"),
    ("onnxruntime", "onnxruntime"),
)

SHORT = (("train", "mixer_b16"), ("train", "mixer_s16"), ("forward", "mixer_b16"))


def load(name: str) -> dict[str, Any]:
    """Returns the results in a suite's folder, or in a file.

    Raises:
      FileNotFoundError: there are none.
    """
    path = pathlib.Path(name)
    path = path / "suite.json" if path.is_dir() else path
    return json.loads(path.read_text(encoding="utf-8"))


def merged(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the items of several suites of one machine as one; the last one counts.

    Raises:
      ValueError: their figures would not compare.
    """
    first, *others = reports
    for other in others:
        for key in ("machine", "dtype", "threads"):
            if first[key] != other[key]:
                raise ValueError(
                    f"The suites were measured with another {key}: {first[key]} and "
                    f"{other[key]}; put them into the pages one by one."
                )
        first = other | {
            "starts": first["starts"] + other["starts"],
            "items": first["items"] | other["items"],
        }
    return first


def title(model: str) -> str:
    """Returns a model's name as papers write it: "B/16" of "mixer_b16"."""
    found = re.fullmatch(r"mixer_([a-z])(\d+)", model)
    return f"{found[1].upper()}/{found[2]}" if found else model


def where(report: dict[str, Any]) -> str:
    """Returns one sentence: machine, versions, date, commit."""
    machine, versions = report["machine"], report["machine"]["versions"]
    if machine["platform"] == "cpu":
        vectors = {True: " with AVX-512", False: " without AVX-512", None: ""}
        threads = report["threads"]
        what = f"{machine['cpu_model']}{vectors[machine['avx512']]}, {threads} thread"
        what += "s" * (threads > 1) + ", CPU time"
    else:
        what = machine["device_kind"]
    peers = dict(versions)
    for result in report["items"].values():
        for side in result.get("sides", {}).values():
            peers |= side.get("versions", {})
    names = ("jax", "jaxlib", "flax", "torch", "timm", "onnxruntime")
    packages = ", ".join(f"{name} {peers[name]}" for name in names if name in peers)
    results = report["items"].values()
    dates = sorted({result["date"].partition(" ")[0] for result in results})
    commits = list(dict.fromkeys(result["commit"] or "" for result in results))
    made = " to ".join(dict.fromkeys(dates[:1] + dates[-1:]))
    if any(commits):
        made += f", commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    return f"{what}, {report['dtype']}; {packages}; {made}"


def ratio(side: dict[str, Any], other: dict[str, Any]) -> str:
    """Returns how many times as fast `side` is as `other`, per image."""
    if "images_per_s" not in side or "images_per_s" not in other:
        return "–"
    return f"{side['images_per_s'] / other['images_per_s']:.2f}"


def lines_of(result: dict[str, Any]) -> Iterator[str]:
    """Yields an item's figures in words, one line for each side."""
    if "rates" in result:
        for name, rate in result["rates"].items():
            yield f"{name}: {rate['flops_per_s'] / 1e9:,.0f} GFLOP/s"
        if "copy_bytes_per_s" in result:
            yield f"copy: {result['copy_bytes_per_s'] / 1e9:,.0f} GB/s"
    for label, side in result.get("sides", {}).items():
        found = [side["error"]] if "error" in side else []
        if "images_per_s" in side:
            found += [
                f"{side['images_per_s']:,.1f} images/s",
                f"{1e3 * side['median_s']:,.2f} ms",
                f"spread {side['spread']:.0%}",
                f"{side['share_of_product_rate']:.0%} of the product rate",
            ]
        if "temp_bytes" in side:
            found.append(f"{side['temp_bytes'] / 2**20:,.0f} MiB")
        yield f"{label}: {', '.join(found)}"


def headlines(report: dict[str, Any]) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Yields (pass, model, batch, sides) of the items that compare with peers."""
    for name, result in report["items"].items():
        found = re.fullmatch(r"(train|forward) (\w+) batch (\d+)", name)
        if found and "images_per_s" in result.get("sides", {}).get("ours", {}):
            yield found[1], found[2], int(found[3]), result["sides"]


def headline_table(report: dict[str, Any], *, short: bool = False) -> str:
    """Returns our model beside its peers, as a table of Markdown.

    Args:
      report: results of a suite.
      short: whether only the rows of `SHORT` are shown, and no memory.
    """
    rows = [
        row
        for row in sorted(headlines(report), key=lambda row: row[0] != "train")
        if not short or row[:2] in SHORT
    ]
    peers = [(k, head) for k, head in PEERS if any(k in sides for *_, sides in rows)]
    heads = ["", "images/s", "of the product rate"]
    heads += [f"beside {head}" for _, head in peers]
    heads += [] if short else ["temporary memory, of plain Flax"]
    table = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for kind, model, batch, sides in rows:
        ours = sides["ours"]
        cells = [
            f"{title(model)} {PASSES[kind]}, batch {batch}",
            _number(ours["images_per_s"]),
            f"{ours['share_of_product_rate']:.0%}",
        ]
        for key, _ in peers:
            beside = ratio(ours, sides.get(key, {}))
            cells.append(beside if beside == "–" else f"{beside} ×")
        if not short:
            mine, its = (s.get("temp_bytes") for s in (ours, sides.get("literal", {})))
            cells.append(f"{mine / its:.2f}" if mine and its else "–")
        table.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def item_table(name: str, result: dict[str, Any]) -> str:
    """Returns all figures of an item as a table of Markdown."""
    if "rates" in result:
        lines = ["| product | shape | TFLOP/s |", "|---|---|---:|"]
        for label, rate in result["rates"].items():
            shape = " × ".join(f"{n:,}" for n in rate["shape"])
            lines.append(f"| {label} | {shape} | {rate['flops_per_s'] / 1e12:.3g} |")
        if "copy_bytes_per_s" in result:
            lines.append(f"\nCopy: {result['copy_bytes_per_s'] / 1e9:,.0f} GB/s.")
        return "\n".join(lines)
    heads = (
        "| side | images/s | ms a call | spread | of the product rate "
        "| beside the first | temporary MiB | all MiB | compile CPU s | page faults |"
    )
    lines = [heads, "|---" + "|---:" * 9 + "|"]
    sides = result.get("sides", {})
    first: dict[str, Any] = next(iter(sides.values()), {})
    for label, side in sides.items():
        if "error" in side:
            lines.append(f"| {label} | {side['error'][:80]} |" + " |" * 8)
            continue
        faults = side.get("rounds", {}).get("page_faults", [])
        cells = [
            label,
            _cell(side, "images_per_s", 1, ",.4g"),
            _cell(side, "median_s", 1e-3, ",.2f"),
            _cell(side, "spread", 1, ".0%"),
            _cell(side, "share_of_product_rate", 1, ".0%"),
            ratio(side, first),
            _cell(side, "temp_bytes", 2**20, ",.0f"),
            _cell(side, "total_bytes", 2**20, ",.0f"),
            f"{side['compile_cpu_s'][0]:.1f}" if "compile_cpu_s" in side else "–",
            f"{sorted(faults)[len(faults) // 2]:,.0f}" if faults else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for label, side in sides.items():
        if "kernels" in side:
            lines.append(f"\nKernels of {label}:\n\n{kernel_table(side)}")
    if note := result.get("note"):
        lines.append(f"\n({note})")
    if result.get("status", "done") != "done":
        lines.append(f"\n({result['status']})")
    return "\n".join(lines)


def kernel_table(side: dict[str, Any]) -> str:
    """Returns the kernels of a side's program by kind, as a table of Markdown."""
    lines = ["| kind | number | reads MB | writes MB |", "|---|---:|---:|---:|"]
    for kind, one in sorted(side["kernels"].items()):
        read, written = one["read_bytes"] / 1e6, one["written_bytes"] / 1e6
        lines.append(f"| {kind} | {one['count']:,} | {read:,.0f} | {written:,.0f} |")
    total = sum(side["written_elsewhere_bytes"].values()) / 1e6
    lines.append(
        f"\nKernels other than products write {total:,.2f} MB per image and block."
    )
    return "\n".join(lines)


def _cell(side: dict[str, Any], key: str, unit: float, form: str) -> str:
    return format(side[key] / unit, form) if key in side else "–"


def table(report: dict[str, Any]) -> str:
    """Returns everything that a suite has measured, as a page of Markdown."""
    parts = [f"# Suite\n\n{where(report)}.", headline_table(report)]
    for name, result in report["items"].items():
        parts.append(f"## {name}\n\n{item_table(name, result)}")
    if report["left_out"]:
        left = [f"* {name}: {why}" for name, why in report["left_out"].items()]
        parts.append("## Left out\n\n" + "\n".join(left))
    return "\n\n".join(parts) + "\n"


# --- Two suites -----------------------------------------------------------------------


def comparison(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Returns the speed of every side of suite B beside the same of suite A.

    A ratio's range is that of single rounds: the slowest of one over the fastest of
    the other. It is marked where every round of one is faster than every one of the
    other.
    """
    lines = [f"A: {where(a)}", f"B: {where(b)}", ""]
    lines.append(f"{'B / A':>6}  {'range':>13}  {'':9}  of the product rate, A and B")
    for name, result in a["items"].items():
        others = b["items"].get(name, {}).get("sides", {})
        for label, one in result.get("sides", {}).items():
            two = others.get(label, {})
            if "images_per_s" not in one or "images_per_s" not in two:
                continue
            speed, low, high = speeds(one, two)
            mark = "faster" if low > 1 else "slower" if high < 1 else ""
            shares = [x["share_of_product_rate"] for x in (one, two)]
            lines.append(
                f"{speed:6.2f}  {low:5.2f} – {high:5.2f}  {mark:9}  "
                f"{shares[0]:4.0%} {shares[1]:4.0%}  {name}: {label}"
            )
    only = {
        "A": [name for name in a["items"] if name not in b["items"]],
        "B": [name for name in b["items"] if name not in a["items"]],
    }
    lines += [f"only in {k}: {', '.join(names)}" for k, names in only.items() if names]
    return "\n".join(lines)


def speeds(one: dict[str, Any], two: dict[str, Any]) -> tuple[float, float, float]:
    """Returns speed of `two` beside `one`, per image: of medians, least, most."""
    images = two["batch"] / one["batch"]
    return (
        images * one["median_s"] / two["median_s"],
        images * one["min_s"] / two["max_s"],
        images * one["max_s"] / two["min_s"],
    )


# --- Files ----------------------------------------------------------------------------


def write_folder(
    report: dict[str, Any], folder: pathlib.Path
) -> Iterator[pathlib.Path]:
    """Writes table.md, and plot.png if matplotlib is installed; yields the paths."""
    path = folder / "table.md"
    path.write_text(table(report), encoding="utf-8")
    yield path
    yield from plot(report, folder / "plot.png")


def plot(report: dict[str, Any], path: pathlib.Path) -> list[pathlib.Path]:
    """Draws the curves of a suite, if it has some and matplotlib is installed."""
    try:
        import suite_plot
    except ImportError:
        return []
    return list(suite_plot.write_plot(report, path))


# What is between <!-- suite: PLATFORM WHAT --> and <!-- end of suite -->, where WHAT is
# nothing (our model beside its peers), "short" (the same, in fewer rows), or an item.
MARKED = re.compile(
    r"(?P<begin><!-- suite: (?P<platform>\w+)(?: (?P<what>[^\n]+?))? -->\n)"
    r".*?(?P<end><!-- end of suite -->)",
    re.S,
)


def rewritten(page: str, report: dict[str, Any]) -> str:
    """Returns a page with a suite's tables between the marks of its platform."""

    def replaced(found: re.Match[str]) -> str:
        what, items = found["what"], report["items"]
        if found["platform"] != report["machine"]["platform"]:
            return found[0]
        if what in (None, "short") and any(headlines(report)):
            made = headline_table(report, short=what == "short")
            made += f"\n\n{where(report)}."
        elif what in items:
            made = item_table(what, items[what])
            if made_at := items[what].get("commit"):
                date = items[what]["date"].partition(" ")[0]
                made += f"\n\n({date}, commit {made_at})"
        else:
            return found[0]
        return f"{found['begin']}{made}\n{found['end']}"

    return MARKED.sub(replaced, page)


def write_pages(report: dict[str, Any], root: pathlib.Path = ROOT) -> Iterator[str]:
    """Keeps a suite in docs/benchmarks, and puts its tables and plot into the pages.

    Yields:
      Names of the files that have changed.
    """
    platform = report["machine"]["platform"]
    path = root / f"docs/benchmarks/{platform}_suite.json"
    text = json.dumps(report, indent=1) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
        yield str(path.relative_to(root))
        for drawn in plot(report, root / f"docs/speed_{platform}.png"):
            yield str(drawn.relative_to(root))
    for name in PAGES:
        path = root / name
        page = path.read_text(encoding="utf-8") if path.exists() else ""
        if (changed := rewritten(page, report)) != page:
            path.write_text(changed, encoding="utf-8")
            yield name
