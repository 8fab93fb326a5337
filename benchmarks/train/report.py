"""Markdown tables of one or more results files: ``python benchmarks/train/report.py RESULTS.json...``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:] = [
        str(ROOT),
        *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks" / "train"),
    ]

from benchmarks.train.shapes import SHAPES  # noqa: E402

Found = dict[str, Any]

SUBJECTS = {
    "ours": "toolkit",
    "plain": "Transformers + PEFT",
    "trl": "TRL + Liger",
    "unsloth": "Unsloth",
    "llamafactory": "LLaMA-Factory",
}
ENDINGS = ("out_of_memory", "error", "cut_off")
GB = 1e9 / 2**30


@dataclass(frozen=True)
class Measured:
    """Cases of all files, the later file winning, and the machines they ran on."""

    cases: dict[str, Found]
    machines: dict[str, Found]

    def best(self, name: str) -> Found | None:
        """The fastest batch of a case; ``None`` when none was measured."""
        taken = [
            value for key, value in self.cases.items()
            if key.startswith(f"{name}/") and "tokens_per_s" in value
        ]  # fmt: skip
        return max(taken, key=lambda value: float(value["tokens_per_s"]), default=None)

    def rate(self, name: str) -> float | None:
        """Tokens per second of a case at its best."""
        found = self.best(name)
        return float(found["tokens_per_s"]) if found else None

    def peak_tflops(self, machine: str) -> float | None:
        """The measured matmul peak of the machine that a case ran on."""
        for name, value in self.cases.items():
            if (
                name.startswith("device/")
                and value["machine"] == machine
                and "bf16_matmul_tflops" in value
            ):
                return float(value["bf16_matmul_tflops"])
        return None


def read(files: list[Path]) -> Measured:
    """Put files together; machines keep apart what each file calls them."""
    cases: dict[str, Found] = {}
    machines: dict[str, Found] = {}
    for number, file in enumerate(files):
        values = json.loads(file.read_text())
        for key, machine in values["machines"].items():
            machines[f"{number}:{key}"] = machine
        for name, value in values["cases"].items():
            cases[name] = shortened(value) | {"machine": f"{number}:{value['machine']}"}
    return Measured(cases, machines)


def shortened(value: Found) -> Found:
    """Messages on one line, without the paths that stand deep in them."""
    kept = {key: " ".join(str(value[key]).split())[:150] for key in ENDINGS if key in value}
    return value | kept


def table(head: list[str], lines: list[list[str]]) -> str:
    """Markdown, or nothing without lines."""
    if not lines:
        return ""
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *lines])


def told(head: list[str], lines: list[list[str]], always: int = 8) -> str:
    """A table without the columns after ``always`` that say nothing: older files have no power."""
    kept = [n for n in range(len(head)) if n < always or any(line[n] != "-" for line in lines)]
    return table([head[n] for n in kept], [[line[n] for n in kept] for line in lines])


def label(found: Found) -> str:
    """Who it is, with settings that tell cases of one subject apart."""
    settings = found["settings"]
    words = []
    if found["subject"] == "ours":
        unknown = found.get("settings_not_in_this_commit", [])
        words = [
            f"`speed: {settings.get('speed', 'plain')}`" if "speed" not in unknown else "plain"
        ]
        words += ["FP8 base"] * (settings.get("base_precision") == "fp8" and not unknown)
        words += ["which came to plain"] * ("speed" not in unknown and found.get("path") == "plain"
                                            and settings.get("speed") == "auto")  # fmt: skip
        words += ["compiling gave up"] * ("gave_up" in found)
    if settings.get("method") == "qlora":
        words.append("NF4")
    if "recompute" in settings:
        words.append("recomputes" if settings["recompute"] else "keeps activations")
    if "compile" in settings:
        words.append("compiled by layer" if settings["compile"] else "not compiled")
    return f"{SUBJECTS[found['subject']]}, {', '.join(words)}"


def speed(measured: Measured, names: list[str]) -> str:
    """One line for each case that was measured, at its best batch."""
    plain = measured.rate("plain-peft")
    lines = []
    for name in names:
        found = measured.best(name)
        if not found:
            continue
        rate = float(found["tokens_per_s"])
        lines.append([
            label(found), f"{found['batch']} x {found['sequence']:,}", f"{rate:,.0f}",
            f"{rate / plain:.2f} x" if plain and found["sequence"] == 4096 else "-",
            mfu(measured, found),
            gib(found, "peak_allocated_gib"), gib(found, "peak_reserved_gib"), gib(found, "device_used_gib"),
            number(found, "gpu_power_usage_watts"), number(found, "wh_per_million_tokens"),
        ])  # fmt: skip
    return told(["who", "rows x tokens", "tokens/s", "of plain", "MFU", "peak allocated, GiB",
                 "reserved", "device, CUDA included", "power, W", "Wh per million tokens"], lines)  # fmt: skip


def gib(found: Found, key: str) -> str:
    """A memory figure, or a dash where there was no GPU."""
    return f"{found[key]:.1f}" if key in found else "-"


def number(found: Found, key: str) -> str:
    """A whole number, or a dash where the driver did not tell."""
    return f"{found[key]:,.0f}" if key in found else "-"


def mfu(measured: Measured, found: Found) -> str:
    """4 x parameters FLOP a token, of the matmul peak measured on the same machine."""
    peak = measured.peak_tflops(found["machine"])
    if not peak:
        return "-"
    done = found["tokens_per_s"] * SHAPES[found["shape"]].flop_per_token() / 1e12
    return f"{100 * done / peak:.1f} %"


@dataclass(frozen=True)
class Goal:
    """A line of the issue's table."""

    text: str
    limit: str
    value: Callable[[Measured], float | None]
    shown: Callable[[float], str]
    reached: Callable[[float], bool]


def fast(text: str, case: str, least: int) -> Goal:
    """At least so many tokens per second."""
    return Goal(text, f">= {least:,} tokens/s", lambda m: honest(m, case),
                lambda v: f"{v:,.0f} tokens/s", lambda v: v >= least)  # fmt: skip


def honest(measured: Measured, case: str) -> float | None:
    """A rate of a commit whose recipe knows the case's settings."""
    found = measured.best(case)
    unknown = found.get("settings_not_in_this_commit", []) if found else []
    return None if unknown else measured.rate(case)


def reserved_gb(measured: Measured, case: str) -> float | None:
    """Peak of a case's allocator in GB (1e9 bytes), as bought."""
    found = measured.best(case)
    return found["peak_reserved_gib"] / GB if found and "peak_reserved_gib" in found else None


def packed_ratio(measured: Measured) -> float | None:
    """Useful tokens per second, packed to padded."""
    packed, padded = honest(measured, "ours-auto-packed"), honest(measured, "ours-auto-padded")
    return packed / padded if packed and padded else None


def lost(measured: Measured, every: int = 50) -> float | None:
    """Share of the stage's time that is no bare step, with a checkpoint every ``every`` steps."""
    stage = measured.best("stage")
    bare = measured.cases.get(f"ours-auto-bf16/b{stage['batch']}") if stage else None
    if not stage or not bare or "step_s" not in bare or bare["machine"] != stage["machine"]:
        return None
    taken = bare["tokens_per_step"] / bare["tokens_per_s"]
    whole = stage["step_mean_s"] + max(0.0, stage.get("checkpoint_s") or 0.0) / every
    return float(100 * (1 - taken / whole))


def first_step(measured: Measured) -> float | None:
    """Of the real stage, from the start of its worker; its caches are those the bare case filled."""
    stage = measured.best("stage")
    warm = stage and stage["compiled_files_found"] > 0
    return float(stage["seconds_to_first_step"]) if stage and warm else None


GOALS = (
    fast("LoRA, bf16 base", "ours-auto-bf16", 16_500),
    fast("LoRA, bf16 base, within 24 GB", "ours-auto-bf16-24gb", 12_500),
    fast("LoRA, base frozen in FP8", "ours-auto-fp8", 23_000),
    fast("LoRA, base frozen in FP8, within 24 GB", "ours-auto-fp8-24gb", 19_000),
    fast("QLoRA, NF4, best batch", "ours-auto-nf4", 14_000),
    Goal("QLoRA, NF4, sequence 2048: memory", "<= 10 GB",
         lambda m: reserved_gb(m, "ours-auto-nf4-10gb"), lambda v: f"{v:.1f} GB", lambda v: v <= 10),
    Goal("QLoRA of a 70B shape, sequence 4096, one GPU", "runs",
         lambda m: honest(m, "ours-70b-nf4"), lambda v: f"{v:,.0f} tokens/s", lambda v: v > 0),
    Goal("packed rows against padded, useful tokens/s", ">= 3 x", packed_ratio,
         lambda v: f"{v:.2f} x", lambda v: v >= 3),
    Goal("step time lost to data, logging, checkpoints, MLflow", "< 2 %", lost,
         lambda v: f"{v:.2f} %", lambda v: v < 2),
    Goal("time to first step of `toolkit train`, warm caches", "< 60 s", first_step,
         lambda v: f"{v:.0f} s", lambda v: v < 60),
)  # fmt: skip


def goals(measured: Measured) -> str:
    """The goals that were measured: a machine does not run every case."""
    lines = [
        [goal.text, goal.limit, goal.shown(value), "yes" if goal.reached(value) else "**no**"]
        for goal in GOALS
        if (value := goal.value(measured)) is not None
    ]
    return table(["goal", "limit", "measured", "reached"], lines)


def real_rows(measured: Measured) -> str:
    """Rows of log-normal lengths, laid three ways."""
    named = {
        "ours-auto-padded": "padded to the longest of the batch, in the data's order",
        "ours-auto-bucketed": "padded, rows of like length together (`packing: false`)",
        "ours-auto-packed": "packed (`packing: true`)",
        "plain-padded": "padded, `speed: plain`",
    }
    padded = measured.rate("ours-auto-padded")
    lines = []
    for name, what in named.items():
        found = measured.best(name)
        if found:
            rate = float(found["tokens_per_s"])
            lines.append([what, str(found["batch"]), f"{found['tokens_per_step']:,}", f"{rate:,.0f}",
                          f"{rate / padded:.2f} x" if padded else "-"])  # fmt: skip
    return table(
        ["rows", "in a batch", "tokens of a step, no padding", "useful tokens/s", "of padded"],
        lines,
    )


def starts(measured: Measured) -> str:
    """Seconds to the first step of each case."""
    lines = [
        [f"`{name}`", f"{v['imports_s']:.1f}", f"{v['seconds_to_model']:.1f}",
         f"{v['seconds_to_first_step']:.1f}", str(v["compiled_files_found"])]
        for name, v in measured.cases.items()
        if "seconds_to_first_step" in v and "seconds_to_model" in v
    ]  # fmt: skip
    return table(["case", "imports, s", "model there after, s", "first step done after, s",
                  "compiled files found"], lines)  # fmt: skip


def stage(measured: Measured) -> str:
    """The stage beside the bare step."""
    found = measured.best("stage")
    bare = measured.cases.get(f"ours-auto-bf16/b{found['batch']}") if found else None
    if not found or not bare or "tokens_per_s" not in bare:
        return ""
    said = found.get("stage_metrics", {})
    return told(
        ["bare step, s", "step in the stage, s", "checkpoint, s", "lost with one every 50 steps",
         "to first step, s", "after last step, s", "MLflow", "MFU as the toolkit logs it", "power, W"],
        [[f"{bare['tokens_per_step'] / bare['tokens_per_s']:.3f}", f"{found['step_mean_s']:.3f}",
          f"{found['checkpoint_s']:.2f}" if found.get("checkpoint_s") is not None else "-",
          f"{share:.2f} %" if (share := lost(measured)) is not None else "-",
          f"{found['seconds_to_first_step']:.1f}", f"{found['seconds_after_last_step']:.1f}",
          "yes" if found["mlflow"] else "no",
          f"{said['mfu_percentage']:.1f} %" if "mfu_percentage" in said else "-",
          number(said, "gpu_power_usage_watts")]],
        always=7,
    )  # fmt: skip


def missing(measured: Measured) -> str:
    """What was tried and gave no number."""
    lines = []
    for name, value in measured.cases.items():
        for key in ENDINGS:
            if key in value:
                lines.append(
                    [f"`{name}`", key.replace("_", " "), str(value[key]).replace("|", "/")[:160]]
                )
                break
    return table(["case", "ended", "with"], lines)


def machines(measured: Measured) -> str:
    """What it ran on, and with which packages."""
    lines = []
    for name, machine in measured.machines.items():
        peak = measured.peak_tflops(name)
        gpu = " and ".join((machine["gpu"] or machine["cpu"]).splitlines())
        lines.append(
            f"- {gpu}; {machine['cpus']} cores; Linux {machine['kernel']}; "
            f"Python {machine['python']}; commit {machine['commit'] or 'not recorded'}"
            + (f"; bf16 matmul {peak:.0f} TFLOP/s" if peak else "")
        )
    packages: dict[str, dict[str, str]] = {}
    for value in measured.cases.values():
        if value.get("subject") in SUBJECTS:
            packages.setdefault(SUBJECTS[value["subject"]], value.get("packages", {}))
    lines += [
        f"- {who}: {', '.join(f'{k} {v}' for k, v in found.items())}"
        for who, found in packages.items()
    ]
    return "\n".join(lines) + "\n"


FULL = ["ours-auto-bf16", "ours-auto-fp8", "trl-liger-compiled", "trl-liger", "unsloth", "unsloth-recompute",
        "llamafactory", "plain-peft", "plain-peft-recompute", "ours-plain-bf16"]  # fmt: skip
SMALL = ["ours-auto-bf16-24gb", "ours-auto-fp8-24gb", "ours-auto-nf4-10gb", "plain-peft-nf4-10gb"]
FOUR_BITS = ["ours-auto-nf4", "unsloth-nf4", "plain-peft-nf4", "ours-70b-nf4"]


def report(measured: Measured) -> str:
    """All tables that have lines."""
    parts = {
        "Machine and versions": machines(measured),
        "Goals": goals(measured),
        "LoRA, one GPU, sequence 4,096": speed(measured, FULL),
        "In little memory": speed(measured, SMALL),
        "QLoRA": speed(measured, FOUR_BITS),
        "Rows of real lengths": real_rows(measured),
        "The stage beside the bare step": stage(measured),
        "Time to the first step": starts(measured),
        "No number": missing(measured),
    }
    return "\n".join(f"#### {title}\n\n{text}" for title, text in parts.items() if text)


def main() -> None:
    """Print the tables; ``--raw`` keeps the numbers for docs/measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--raw", type=Path, help="write all files' cases into one")
    options = parser.parse_args()
    measured = read(options.results)
    if options.raw:
        whole = {"schema": 1, "machines": measured.machines, "cases": measured.cases}
        options.raw.write_text(json.dumps(whole, indent=1) + "\n")
    print(report(measured))


if __name__ == "__main__":
    main()
