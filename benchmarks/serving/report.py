"""Markdown tables of one or more results files: ``python3 benchmarks/serving/report.py RESULTS.json...``."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Measurements = dict[str, dict[str, Any]]

SERVERS = {
    "vllm-bf16": "vLLM bf16, toolkit",
    "vllm-bare": "vLLM bf16, bare",
    "vllm-w4a16": "vLLM W4A16, toolkit",
    "vllm-w4a16-bare": "vLLM W4A16, bare",
    "sglang-bf16": "SGLang bf16, toolkit",
    "sglang-bare": "SGLang bf16, bare",
    "sglang-w4a16": "SGLang W4A16, toolkit",
    "sglang-w4a16-bare": "SGLang W4A16, bare",
}
ENGINES = ("vllm", "sglang")
ASKED = {"base": "base", "one": "1 adapter", "eight": "8 adapters, mixed"}


def bare_part(part: str) -> str:
    """The bare server that a toolkit's one is compared with."""
    engine, _, kind = part.partition("-")
    return f"{engine}-w4a16-bare" if kind.startswith("w4a16") else f"{engine}-bare"


def repeats(found: Measurements, start: str) -> list[dict[str, Any]]:
    """Every repeat of one measurement."""
    return [
        value
        for name, value in found.items()
        if name.startswith(f"{start}/") and "error" not in value
    ]


def rate(found: Measurements, start: str) -> float | None:
    """Output tokens per second over all repeats; ``None`` when it was not measured."""
    taken = repeats(found, start)
    seconds = sum(value["seconds"] for value in taken)
    return sum(value["completion_tokens"] for value in taken) / seconds if taken else None


def middle(values: Iterable[float]) -> float:
    """Median."""
    return statistics.median(list(values))


def share(part: float | None, whole: float | None) -> str:
    """``91.2 %``, or a dash."""
    return f"{100 * part / whole:.1f} %" if part and whole else "-"


def times(part: float | None, whole: float | None) -> str:
    """``8.1 x``, or a dash."""
    return f"{part / whole:.1f} x" if part and whole else "-"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown, or nothing without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def hugging_face(found: Measurements) -> list[tuple[str, float]]:
    """(what, tokens per second) of Transformers' own ``generate``."""
    taken = found["hf/generate"]
    rows = [(f"HF generate, batch {taken['batch']}", float(taken["tokens_per_s"]))]
    if "one_by_one" in taken:
        rows.append(
            ("HF generate, one after the other", float(taken["one_by_one"]["tokens_per_s"]))
        )
    return rows


def throughput(found: Measurements, level: int) -> str:
    """Tokens per second at one level, with every ratio beside it."""
    generate = found.get("hf/generate", {}).get("tokens_per_s")
    rows = []
    names = SERVERS | {
        name.split("/")[0]: f"vLLM bf16, `{name.split('/')[0].removeprefix('vllm-variant-')}`"
        for name in found
        if name.startswith("vllm-variant-")
    }
    for part, label in names.items():
        base, bare = (
            rate(found, f"{part}/base-{level}"),
            rate(found, f"{bare_part(part)}/base-{level}"),
        )
        for who, asked in ASKED.items():
            taken = repeats(found, f"{part}/{who}-{level}")
            speed = rate(found, f"{part}/{who}-{level}")
            if speed is None:
                continue
            spans = [
                f"{middle(v[span]['p50'] for v in taken):.1f} / {middle(v[span]['p99'] for v in taken):.1f}"
                for span in ("ttft_ms", "tpot_ms")
            ]
            rows.append([label, asked, f"{speed:,.0f}", *spans, share(speed, base), share(speed, bare),
                         times(speed, generate) if level == 64 else "-"])  # fmt: skip
    if generate and level == 64:
        rows += [[label, "base", f"{speed:,.0f}", *"----", times(speed, generate)]
                 for label, speed in hugging_face(found)]  # fmt: skip
    head = ["server", "asked", "output tokens/s", "first token ms, p50 / p99", "per token ms, p50 / p99",
            "of its base", "of the bare engine's base", "of HF generate"]  # fmt: skip
    return table(head, rows)


def starts(found: Measurements) -> str:
    """Cold and warm, with the phases."""
    rows = []
    for engine in ENGINES:
        parts = {"cold": f"{engine}-bf16", "warm": f"{engine}-warm"}
        for name in found:
            part = name.partition("/")[0]
            for prefix, label in (("cold-", "cold"), ("start-", "warm")):
                if part.startswith(f"{engine}-{prefix}"):
                    parts[f"{label}, `{part.removeprefix(f'{engine}-{prefix}')}`"] = part
        for label, part in parts.items():
            start = found.get(f"{part}/start")
            variant = part.partition("-")[2].partition("-")[2]
            cold = found.get(
                f"{engine}-cold-{variant}/start" if variant else f"{engine}-bf16/start"
            )
            if start:
                phases = ", ".join(f"{name} {took:.1f}" for name, took in start["phases"].items())
                of_cold = share(start["seconds"], cold and cold["seconds"])
                rows.append([engine, label, f"{start['seconds']:.1f}", of_cold, phases])
    return table(["engine", "start", "seconds to healthy", "of cold", "phases, seconds"], rows)


def fronts(found: Measurements) -> str:
    """The same load with and without the front."""
    rows = []
    for engine in ENGINES:
        many, single = (repeats(found, f"{engine}-bf16/front-{kind}") for kind in ("64", "one"))
        if many:
            direct, through = both_rates(many)
            lost = f"{100 * (1 - through / direct):.1f} %"
            more = [f"{added(many, span):+.2f}" for span in ("ttft_ms", "tpot_ms", "e2e_ms")]
            rows.append([engine, "64", f"{direct:,.0f}", f"{through:,.0f}", lost, *more])
        if single:
            more = [f"{added(single, span):+.2f}" for span in ("ttft_ms", "e2e_ms")]
            rows.append([engine, "1, one token", "-", "-", "-", more[0], "-", more[1]])
    head = ["engine", "clients", "direct, tokens/s", "through the front", "lost"]
    head += [f"{span}, p50, ms more" for span in ("first token", "per token", "answer")]
    return table(head, rows)


def both_rates(taken: list[dict[str, Any]]) -> tuple[float, float]:
    """Output tokens per second over the repeats: direct, and through the front."""
    direct, through = (
        sum(value[side]["completion_tokens"] for value in taken)
        / sum(value[side]["seconds"] for value in taken)
        for side in ("direct", "front")
    )
    return direct, through


def added(taken: list[dict[str, Any]], span: str) -> float:
    """Median over the repeats of what the front added to the p50, ms."""
    return middle(value["front"][span]["p50"] - value["direct"][span]["p50"] for value in taken)


def swaps(found: Measurements) -> str:
    """Adapters that came and went under load."""
    rows = []
    for engine in ENGINES:
        value = found.get(f"{engine}-bf16/swap")
        if value:
            spans = [
                f"{1000 * middle(one[name] for one in value['swaps']):.0f}"
                for name in ("load_s", "first_answer_s", "unload_s")
            ]
            streams = value["streams"]
            counts = [str(streams["requests"]), str(streams["failed"])]
            rows.append([engine, *spans, *counts, f"{streams['gap_ms']['max']:.0f}"])
    head = ["engine", "load, ms", "first answer, ms", "unload, ms"]
    head += ["requests meanwhile", "failed", "longest gap in a stream, ms"]
    return table(head, rows)


def goals(found: Measurements) -> str:
    """Each goal, what was measured, and whether that meets it."""
    rows = []
    for engine in ENGINES:
        for text, measured, sign, limit, unit in engine_goals(found, engine):
            if measured is not None:
                met = measured >= limit if sign == ">=" else measured <= limit
                shown = [f"{measured:.1f} {unit}", f"{sign} {limit:g} {unit}"]
                rows.append([f"{engine}: {text}", *shown, "yes" if met else "**no**"])
    return table(["goal", "measured", "limit", "met"], rows)


def _start(found: Measurements, engine: str, kind: str) -> float | None:
    return found.get(f"{engine}-{kind}/start", {}).get("seconds")


def engine_goals(
    found: Measurements, engine: str
) -> list[tuple[str, float | None, str, float, str]]:
    """(what, measured, sign, limit, unit) of one engine; ``None`` where it was not measured."""
    part = f"{engine}-bf16"
    base, one, eight = (rate(found, f"{part}/{who}-64") for who in ASKED)
    taken = found.get("hf/generate", {})
    generate, queued = (t.get("tokens_per_s") for t in (taken, taken.get("one_by_one", {})))
    # since `fork` is what the toolkit starts vLLM with, that pair counts where it was measured
    pairs = (("cold-fork", "start-fork"), ("bf16", "warm"))
    cold, warm = next(
        (both for pair in pairs if all(both := [_start(found, engine, kind) for kind in pair])),
        (None, None),
    )
    many, single = (repeats(found, f"{part}/front-{kind}") for kind in ("64", "one"))
    lost = 100 * (1 - both_rates(many)[1] / both_rates(many)[0]) if many else None
    return [
        ("cost of 1 adapter, bf16, 64 clients", lower(one, base), "<=", 12, "%"),
        ("cost of 8 adapters, mixed, bf16, 64 clients", lower(eight, base), "<=", 12, "%"),
        ("base to HF generate, 64 clients in one batch", ratio(base, generate), ">=", 8, "x"),
        ("base to HF generate, 64 clients one after the other", ratio(base, queued), ">=", 8, "x"),
        ("warm start of cold", 100 * warm / cold if cold and warm else None, "<=", 40, "%"),
        ("throughput lost to the front, 64 streams", lost, "<=", 3, "%"),
        ("p50 added by the front, 1 client", added(single, "e2e_ms") if single else None, "<=", 1.5, "ms"),
    ]  # fmt: skip


def ratio(part: float | None, whole: float | None) -> float | None:
    """How many times ``whole``."""
    return part / whole if part and whole else None


def lower(part: float | None, whole: float | None) -> float | None:
    """By how many percent ``part`` is below ``whole``."""
    return 100 * (1 - part / whole) if part and whole else None


def machine(values: dict[str, Any]) -> str:
    """Where and with what."""
    lines = []
    for known in values["machines"].values():
        host = f"{known['cpus']} CPUs ({known['cpu']}); Linux {known['kernel']}; Python {known['python']}"
        lines.append(f"{known['gpu'] or 'no GPU'}; {host}.")
    for name, value in values["measurements"].items():
        part = name.partition("/")[0]
        if value.get("versions") and part in ("hf", "vllm-bf16", "sglang-bf16"):
            packages = ", ".join(
                f"{key} {version}" for key, version in sorted(value["versions"].items())
            )
            lines.append(f"{part}: {packages}.")
    return "\n".join(lines)


def read(files: list[Path]) -> dict[str, Any]:
    """Several results files as one; a later file wins."""
    merged: dict[str, Any] = {"schema": 1, "machines": {}, "measurements": {}}
    for file in files:
        values, names = json.loads(file.read_text()), {}
        for name, known in values["machines"].items():
            same = (key for key, other in merged["machines"].items() if other == known)
            names[name] = next(same, f"machine-{len(merged['machines']) + 1}")
            merged["machines"][names[name]] = known
        for name, value in values["measurements"].items():
            merged["measurements"][name] = value | {"machine": names[value["machine"]]}
    return merged


def report(values: dict[str, Any]) -> str:
    """All tables that have rows."""
    found: Measurements = values["measurements"]
    failed = [
        f"- {name}: {value['error'].splitlines()[0]}"
        for name, value in found.items()
        if name.endswith("/failed")
    ]
    sections = {
        "Goals": goals(found),
        "64 clients, 128 tokens in, 128 out": throughput(found, 64),
        "256 clients, 512 tokens in, 128 out": throughput(found, 256),
        "Start": starts(found),
        "The front": fronts(found),
        "An adapter swapped in and out under 32 streams": swaps(found),
        "Failed": "\n".join(failed),
    }
    shown = [f"### {title}\n\n{text}" for title, text in sections.items() if text]
    return "\n".join([machine(values), "", *shown])


def main() -> None:
    """Print the tables; ``--raw FILE`` also writes the results as one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--raw", type=Path)
    options = parser.parse_args()
    values = read(options.files)
    if options.raw:
        options.raw.write_text(json.dumps(values, indent=1) + "\n")
    print(report(values))


if __name__ == "__main__":
    main()
