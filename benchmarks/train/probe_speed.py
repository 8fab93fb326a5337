"""Where the time of a training step goes on this GPU: products, attention, whole steps by variant.

    python benchmarks/train/probe_speed.py --out OUT [--budget 200] [--only e2e] [--layers 32]

Llama-3.1-8B shape with random weights. Writes one JSON line per measurement to OUT/probe.jsonl as
it is taken, profiles as text beside it, and a table last. ``--tiny`` runs the same code on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

H, I, V, KV, HEADS = 4096, 14336, 128256, 1024, 32
START = time.monotonic()


class Book:
    def __init__(self, out: Path, budget: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.budget, self.rows = out, budget, []

    def left(self) -> float:
        return self.budget - (time.monotonic() - START)

    def add(self, **row: object) -> None:
        row["at_s"] = round(time.monotonic() - START, 1)
        self.rows.append(row)
        with (self.out / "probe.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def timed(function, repeats=10):
    """Median milliseconds by events."""
    function()
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in zip(marks, marks[1:]))
    return times[len(times) // 2]


def micro(book: Book) -> None:
    dev = "cuda"
    bf = dict(device=dev, dtype=torch.bfloat16)

    def case(name, make, flop=0.0, moved=0.0):
        try:
            function = make()
            ms = timed(function)
            book.add(
                part="micro",
                name=name,
                ms=round(ms, 4),
                tflops=round(flop / ms / 1e9, 1),
                gbs=round(moved / ms / 1e6, 1),
            )
        except Exception as error:  # noqa: BLE001 - a probe reports and goes on
            book.add(part="micro", name=name, error=f"{type(error).__name__}: {error}"[:300])

    def mm(t, k, n, transposed):
        def make():
            a = torch.randn(t, k, **bf)
            b = torch.randn(n, k, **bf).t() if transposed else torch.randn(k, n, **bf)
            return lambda: torch.mm(a, b)

        return make

    shapes = {
        "qkv": (H, H + 2 * KV),
        "o": (H, H),
        "gate_up": (H, 2 * I),
        "down": (I, H),
        "k": (H, KV),
        "gate": (H, I),
    }
    for t in (4096, 12288, 20480):
        for name in ("qkv", "o", "gate_up", "down") + (("k", "gate") if t == 12288 else ()):
            k, n = shapes[name]
            case(f"bf16 fwd {name} T={t}", mm(t, k, n, True), 2.0 * t * k * n)
            case(f"bf16 dgrad {name} T={t}", mm(t, n, k, False), 2.0 * t * k * n)

    def f8(t, k, n, fast, rowwise):
        def make():
            a = torch.randn(t, k, **bf).to(torch.float8_e4m3fn)
            b = torch.randn(n, k, **bf).to(torch.float8_e4m3fn).t()
            one = torch.ones((), device=dev)
            sa = torch.ones(t, 1, device=dev) if rowwise else one
            sb = torch.ones(1, n, device=dev) if rowwise else one
            return lambda: torch._scaled_mm(
                a, b, sa, sb, out_dtype=torch.bfloat16, use_fast_accum=fast
            )

        return make

    for t in (4096, 12288, 20480):
        for name in ("qkv", "o", "gate_up", "down"):
            k, n = shapes[name]
            case(f"fp8 row fast fwd {name} T={t}", f8(t, k, n, True, True), 2.0 * t * k * n)
            case(f"fp8 row fast dgrad {name} T={t}", f8(t, n, k, True, True), 2.0 * t * k * n)
            if t == 12288:
                case(f"fp8 row slow fwd {name} T={t}", f8(t, k, n, False, True), 2.0 * t * k * n)
                case(f"fp8 tensor fast fwd {name} T={t}", f8(t, k, n, True, False), 2.0 * t * k * n)

    t = 12288
    thin = {
        "x@A 4096->48": (t, H, 48),
        "x@A 14336->16": (t, I, 16),
        "dy@B 28672->32": (t, 2 * I, 32),
        "dy@B 6144->48": (t, H + 2 * KV, 48),
    }
    for name, (m, k, n) in thin.items():
        case(f"thin {name}", mm(m, k, n, True), 2.0 * m * k * n, 2.0 * m * k)
        case(f"thin NN {name}", mm(m, k, n, False), 2.0 * m * k * n, 2.0 * m * k)

    def wide(m, n, r):
        def make():
            y, h, b = torch.randn(m, n, **bf), torch.randn(m, r, **bf), torch.randn(r, n, **bf)
            return lambda: y.addmm_(h, b)

        return make

    case("thin y+=hB 28672 r32", wide(t, 2 * I, 32), 0, 4.0 * t * 2 * I)
    case("thin y+=hB 4096 r16", wide(t, H, 16), 0, 4.0 * t * H)

    def tall(m, n, r):
        def make():
            y, h = torch.randn(m, n, **bf), torch.randn(m, r, **bf)
            return lambda: y.t() @ h

        return make

    case("thin dB 28672 r32", tall(t, 2 * I, 32), 0, 2.0 * t * 2 * I)
    case("thin dA 4096 r48", tall(t, H, 48), 0, 2.0 * t * H)
    case("thin dA 14336 r16", tall(t, I, 16), 0, 2.0 * t * I)

    def turn(n, k):
        def make():
            w = torch.randn(n, k, **bf).to(torch.float8_e4m3fn)
            return lambda: w.t().contiguous()

        return make

    case("fp8 turn gate_up", turn(2 * I, H), 0, 2.0 * 2 * I * H)

    def attention(backend, batch, backward, gqa):
        def make():
            from torch.nn.attention import SDPBackend, sdpa_kernel

            n = 4096
            q = torch.randn(batch, n, HEADS, 128, **bf).transpose(1, 2).requires_grad_()
            k = (
                torch.randn(batch, n, 8 if gqa else HEADS, 128, **bf)
                .transpose(1, 2)
                .requires_grad_()
            )
            v = (
                torch.randn(batch, n, 8 if gqa else HEADS, 128, **bf)
                .transpose(1, 2)
                .requires_grad_()
            )
            chosen = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}.get(
                backend
            )

            def forward():
                if chosen is None:
                    return torch.nn.functional.scaled_dot_product_attention(
                        q, k, v, is_causal=True, enable_gqa=gqa
                    )
                with sdpa_kernel(chosen):
                    return torch.nn.functional.scaled_dot_product_attention(
                        q, k, v, is_causal=True, enable_gqa=gqa
                    )

            if not backward:

                def run():
                    with torch.no_grad():
                        forward()

                return run
            out = forward()
            grad = torch.randn_like(out)
            return lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

        return make

    work = 3 * 4.0 * 4096 * 4096 / 2 * 128 * HEADS
    for backend in ("default", "cudnn", "flash"):
        for gqa in (True, False):
            case(f"attention {backend} gqa={gqa} fwd B=3", attention(backend, 3, False, gqa), work)
            case(
                f"attention {backend} gqa={gqa} bwd B=3",
                attention(backend, 3, True, gqa),
                work * 2.5,
            )

    def varlen(backward):
        def make():
            from torch.nn.attention.varlen import varlen_attn

            cu = torch.arange(0, 12289, 4096, device=dev, dtype=torch.int32)
            q = torch.randn(t, HEADS, 128, **bf).requires_grad_()
            k = torch.randn(t, 8, 128, **bf).requires_grad_()
            v = torch.randn(t, 8, 128, **bf).requires_grad_()
            import inspect

            names = inspect.signature(varlen_attn).parameters
            extra = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
            if "enable_gqa" in names:
                extra["enable_gqa"] = True
            book.add(part="micro", name="varlen signature", value=list(names))

            def forward():
                return varlen_attn(q, k, v, cu, cu, 4096, 4096, **extra)

            if not backward:

                def run():
                    with torch.no_grad():
                        forward()

                return run
            out = forward()
            grad = torch.randn_like(out)
            return lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

        return make

    case("attention varlen fwd", varlen(False), work)
    case("attention varlen bwd", varlen(True), work * 2.5)

    def copy():
        a, b = torch.randn(1 << 29, **bf), torch.empty(1 << 29, **bf)
        return lambda: b.copy_(a)

    case("copy 1 GiB", copy, 0, 4.0 * (1 << 29))


def apart(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def kernels(book: Book) -> None:
    """Each kernel against float64, then its time by tile."""
    from toolkit.train.speed import fp8, gated, gated_kernels, loss_kernel
    from toolkit.train.speed.kernels import add_thin
    from toolkit.train.speed.loss import entropy_and_gradient

    dev = "cuda"
    bf = dict(device=dev, dtype=torch.bfloat16)

    def check(name, make):
        try:
            torch.cuda.synchronize()
            book.add(part="check", name=name, **{k: float(f"{v:.3g}") for k, v in make().items()})
        except Exception as error:  # noqa: BLE001 - a probe reports and goes on
            book.add(part="check", name=name, error=f"{type(error).__name__}: {error}"[:400])

    def given(t, i, r):
        return (
            torch.randn(t, 2 * i, **bf),
            torch.randn(t, r, **bf) / r**0.5,
            torch.randn(2 * i, r, **bf),
            torch.rand(2 * i, device=dev) + 0.5,
            torch.randn(t, i, **bf),
            torch.randn(t, 16, **bf) / 4,
            torch.randn(16, i, **bf),
        )

    def plain(y, h, b):
        return (y.double() + h.double() @ b.double().t()).requires_grad_()

    def block(t, i, r):
        def make():
            y, h, b, times, grad, c, d = given(t, i, r)
            wide = plain(y, h, b)
            g, u = wide.chunk(2, 1)
            v = torch.nn.functional.silu(g) * u
            slope = grad.double() + c.double() @ d.double()
            (dy,) = torch.autograd.grad(v, wide, slope)
            v = v.detach()
            got, most = gated.gated(y, h, b, True)
            back, again, largest = gated_kernels.gated_backward(grad, c, d, y, h, b, times)
            q, scale, thin = gated.quantize_thin(back, times, largest, b)
            q2, scale2 = fp8.quantize_rows(back * times)
            return dict(
                v=apart(got, v), most=apart(most, got.abs().amax(1)), again=apart(again, v),
                dy=apart(back, dy), largest=apart(largest, (back * times).abs().amax(1)),
                bytes_apart=float((q.view(torch.uint8) != q2.view(torch.uint8)).double().mean()),
                scale=apart(scale, scale2), thin=apart(thin, back.double() @ b.double()),
            )  # fmt: skip

        return make

    check("gated 1000x14336 r32", block(1000, I, 32))
    check("gated 77x200 r8", block(77, 200, 8))

    def entropy(scale, cap):
        def make():
            z, t = torch.randn(300, V, **bf) * 3, torch.randint(0, V, (300,), device=dev)
            loss, slope = entropy_and_gradient(z.double(), t, scale, cap)
            got = z.clone()
            one = loss_kernel.entropy_(got, t, scale, cap).sum()
            return dict(loss=abs(float(one / loss) - 1), slope=apart(got, slope))

        return make

    check("entropy", entropy(1.0, 0.0))
    check("entropy capped", entropy(0.5, 3.0))

    def tile(name, function, moved=0.0, size=()):
        if book.left() < book.budget - 45:
            return
        try:
            ms = timed(function)
            book.add(
                part="tile", name=name, size=size, ms=round(ms, 4), gbs=round(moved / ms / 1e6, 1)
            )
        except Exception as error:  # noqa: BLE001 - a probe reports and goes on
            book.add(
                part="tile", name=name, size=size, error=f"{type(error).__name__}: {error}"[:200]
            )

    t = 12288
    y, h, b, times, grad, c, d = given(t, I, 32)
    none = times[:0]
    k = gated_kernels
    one, other = torch.randn(1 << 29, **bf), torch.empty(1 << 29, **bf)
    tile("copy 1 GiB", lambda: other.copy_(one), 4.0 * (1 << 29))
    for size in ((64, 64, 8), (64, 32, 4), (64, 64, 4), (128, 32, 8)):
        for many in (none, times):
            tile(f"backward {len(many) > 0}", lambda: k.gated_backward(grad, c, d, y, h, b, many, size),
                 12.0 * t * I, size)  # fmt: skip
    dy, v, largest = k.gated_backward(grad, c, d, y, h, b, times)
    tile("dy^T h", lambda: dy.t() @ h, 4.0 * t * I)
    tile("c^T v", lambda: c.t() @ v, 2.0 * t * I)
    for size in ((64, 64, 4), (64, 64, 8), (64, 32, 4)):
        tile("gated", lambda: k.gated(y, h, b, True, size), 6.0 * t * I, size)
    for size in ((64, 128, 8, 3), (64, 128, 8, 4), (64, 128, 4, 3), (64, 256, 8, 2)):
        for n in (12288, 4096):
            tile(f"quantize_thin T={n}", lambda: k.quantize_thin(dy[:n], times, largest[:n], b, size),
                 6.0 * n * I, size)  # fmt: skip
    logits, targets = torch.randn(1024, V, **bf), torch.randint(0, V, (1024,), device=dev)
    for size in ((8192, 16), (4096, 8), (16384, 32)):
        tile("entropy", lambda: loss_kernel.entropy_(logits, targets, 1.0, 0.0, *size),
             4.0 * 1024 * V, size)  # fmt: skip
    x, w, thin = torch.randn(t, H, **bf), torch.randn(H, H, **bf), torch.randn(t, 16, **bf)
    wide = torch.randn(16, H, **bf)
    tile("o: mm + add_thin", lambda: add_thin(x @ w.t(), thin, wide))
    tile("o: thin mm + addmm_", lambda: (thin @ wide).addmm_(x, w.t()))
    tile("o: mm", lambda: x @ w.t())


def build(layers: int, tiny: bool, kind: str):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(
        hidden_size=H,
        intermediate_size=I,
        num_attention_heads=HEADS,
        num_key_value_heads=8,
        vocab_size=V,
    )
    if tiny:
        shape = dict(
            hidden_size=64,
            intermediate_size=192,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=512,
        )
    config = LlamaConfig(
        **shape,
        num_hidden_layers=layers,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        dtype=torch.bfloat16,
    )
    device = "cpu" if tiny else "cuda"
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    rotary = type(model.model.rotary_emb)(config)
    model = model.to_empty(device=device)
    model.model.rotary_emb = rotary.to(device)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0) if "norm" in name else weight.normal_(0, 0.02)
    if kind == "nf4":
        import bitsandbytes as bnb

        for layer in model.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                for name, child in list(parent.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        new = bnb.nn.Linear4bit(
                            child.in_features,
                            child.out_features,
                            bias=False,
                            compute_dtype=torch.bfloat16,
                            quant_type="nf4",
                        )
                        new.weight = bnb.nn.Params4bit(
                            child.weight.data,
                            requires_grad=False,
                            quant_type="nf4",
                            compress_statistics=True,
                        )
                        new.to(device) if tiny else new.cuda()
                        setattr(parent, name, new)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.01)
            if weight.requires_grad:
                weight.data = weight.data.float()
    model.train()
    return model


def with_parts(without) -> None:
    """The fast path less some of its parts, to see what each is worth."""
    from toolkit.train.speed import apply, loss

    for module, name, other in (
        (apply, "_is_gated", lambda _module: False),
        (loss, "_by_kernel", torch.compile(loss.entropy_and_gradient, dynamic=True)),
    ):
        kept = PARTS.setdefault(name, getattr(module, name))
        setattr(module, name, other if name in without else kept)


PARTS: dict[str, object] = {}


def end_to_end(book: Book, case: dict, tiny: bool, layers: int, eager: bool) -> None:
    import numpy as np

    from toolkit.train.speed.apply import Speed
    from toolkit.train.speed.choose import Choice

    name = case["name"]
    began = time.monotonic()
    device = "cpu" if tiny else "cuda"
    row: dict[str, object] = {"part": "e2e", "name": name}
    if not tiny:
        total = torch.cuda.mem_get_info()[1]
        limit = min(case.get("limit", 79.0) * 2**30 / total, 1.0)
        torch.cuda.set_per_process_memory_fraction(limit if case["kind"] == "bf16" else 1.0)
    model = build(layers, tiny, case["kind"])
    torch._dynamo.reset()
    if tiny and eager:
        plain_compile = torch.compile
        torch.compile = lambda f, **k: plain_compile(f, backend="aot_eager", **k)
    with_parts(case.get("without", ()))
    section = SimpleNamespace(gradient_checkpointing=case.get("recompute", "auto"))
    speed = Speed(model, section, Choice(True, True, ""), case["kind"])
    gc.collect()
    if not tiny:
        row["at_rest_gb"] = round(torch.cuda.memory_allocated() / 1e9, 2)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit)
        torch.cuda.reset_peak_memory_stats()
    batch, length = case["batch"], 64 if tiny else case.get("length", 4096)
    if "keep" in case:
        speed._keep = lambda _tokens: [case["keep"]] * layers
    ids = np.random.default_rng(0).integers(0, 512 if tiny else V, (batch, length))
    if case.get("packed"):
        cuts = (
            np.random.default_rng(1)
            .lognormal(np.log(600) - 0.32, 0.8, 4096)
            .astype(int)
            .clip(16, length)
        )
        bounds = [
            0,
            *[c for c in np.cumsum(cuts if not tiny else cuts // 60 + 4) if c < batch * length],
        ]
        flat = np.arange(batch * length)
        starts = np.zeros(batch * length, int)
        starts[bounds] = bounds
        starts[np.arange(batch) * length] = np.arange(batch) * length
        positions = (flat - np.maximum.accumulate(starts)).reshape(batch, length)
    else:
        positions = np.tile(np.arange(length), (batch, 1))
    sources = (np.arange(batch)[:, None] * length + np.arange(length - 1)).ravel()
    group = SimpleNamespace(
        ids=ids, positions=positions, sources=sources, targets=ids[:, 1:].ravel()
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=not tiny)
    row["build_s"] = round(time.monotonic() - began, 1)

    def step(read=False) -> float:
        loss = speed.summed_loss(group) / len(sources)
        loss.backward()
        if read:  # as the trainer does
            float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if read:
            float(norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    first = time.monotonic()
    losses = [float(step())]
    row["first_step_s"] = round(time.monotonic() - first, 1)
    for _ in range(2):
        losses.append(float(step()))
    if not tiny:
        torch.cuda.synchronize()
    started = time.perf_counter()
    steps = case.get("steps", 5)
    for _ in range(steps):
        last = step()
    losses.append(float(last))
    seconds = (time.perf_counter() - started) / steps
    if not tiny:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(3):
            step(read=True)
        torch.cuda.synchronize()
        row["step_ms_when_read"] = round((time.perf_counter() - started) / 3 * 1e3, 2)
    keeps = {k: speed.keep.count(k) for k in dict.fromkeys(speed.keep)}
    row.update(
        tok_s=round(batch * length / seconds, 1),
        step_ms=round(seconds * 1e3, 2),
        losses=[round(x, 4) for x in losses],
        keep=keeps,
        copies=len(speed.groups[0].frozen),
        gave_up=speed.gave_up,
        graphs=torch._dynamo.utils.counters["stats"].get("unique_graphs"),
        breaks=dict(torch._dynamo.utils.counters["graph_break"]),
    )
    if not tiny:
        row.update(
            peak_gb=round(torch.cuda.max_memory_allocated() / 1e9, 2),
            reserved_gb=round(torch.cuda.max_memory_reserved() / 1e9, 2),
        )
    book.add(**row)
    if case.get("profile"):
        profile(book, name, step, batch * length)
    if tiny and eager:
        torch.compile = plain_compile


def profile(book: Book, name: str, step, tokens: int) -> None:
    from torch.profiler import ProfilerActivity

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as prof:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    spent: dict[str, list[float]] = {}
    edges = []
    for event in prof.events():
        edges.append((event.time_range.start, event.time_range.end))
        took = event.device_time_total if on_gpu else event.cpu_time_total
        entry = spent.setdefault(event.name, [0.0, 0])
        entry[0] += took
        entry[1] += 1
    total = sum(t for t, _ in spent.values())
    top = sorted(spent.items(), key=lambda item: -item[1][0])[:60]
    busy, until = 0.0, 0.0
    for start, end in sorted(edges):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    whole = until - min(edges)[0]
    lines = [
        f"{name}: {total / 1e3:.1f} ms of kernels, {tokens} tokens; {whole / 1e3:.1f} ms from the"
        f" first to the last, idle {100 * (1 - busy / whole):.1f} %"
    ]
    lines += [
        f"{t / 1e3:9.2f} ms {100 * t / total:5.1f} % {n:6d} x {t / n:9.1f} us  {k[:200]}"
        for k, (t, n) in top
    ]
    text = "\n".join(lines)
    (book.out / f"profile-{name.replace(' ', '_').replace('/', '_')}.txt").write_text(text + "\n")
    print("\n".join(line[:150] for line in lines[:26]), flush=True)


OLD = ("_is_gated", "_by_kernel")
CASES = [
    dict(name="bf16 b3", kind="bf16", batch=3, profile=True),
    dict(name="fp8 b3", kind="fp8", batch=3, profile=True),
    dict(name="bf16 b1 24", kind="bf16", batch=1, limit=23.25, profile=True),
    dict(name="bf16 b3 before", kind="bf16", batch=3, without=OLD),
    dict(name="fp8 b3 before", kind="fp8", batch=3, without=OLD),
    dict(name="fp8 b4", kind="fp8", batch=4),
    dict(name="bf16 b3 without entropy", kind="bf16", batch=3, without=("_by_kernel",)),
    dict(name="bf16 b2", kind="bf16", batch=2),
    dict(name="fp8 b1 24", kind="fp8", batch=1, limit=23.25, profile=True),
    dict(name="bf16 b4", kind="bf16", batch=4),
    dict(name="nf4 b1 2048 10", kind="nf4", batch=1, length=2048, limit=8.75),
    dict(name="nf4 b3", kind="nf4", batch=3),
    dict(name="bf16 b3 packed", kind="bf16", batch=3, packed=True),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=200)
    parser.add_argument("--only", default="")
    parser.add_argument("--match", default="")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()
    book = Book(options.out, options.budget)
    book.add(
        part="about",
        torch=torch.__version__,
        device=None if options.tiny else torch.cuda.get_device_name(),
    )
    if options.only in ("", "kernels") and not options.tiny:
        kernels(book)
        gc.collect()
        torch.cuda.empty_cache()
    if options.only == "micro" and not options.tiny:
        micro(book)
        gc.collect()
        torch.cuda.empty_cache()
    if options.only in ("", "e2e"):
        for case in CASES:
            if options.match not in case["name"] or book.left() < 22:
                continue
            try:
                end_to_end(book, case, options.tiny, options.layers, options.eager)
            except Exception as error:  # noqa: BLE001 - a probe reports and goes on
                book.add(
                    part="e2e", name=case["name"], error=f"{type(error).__name__}: {error}"[:600]
                )
                traceback.print_exc(limit=-6)
            gc.collect()
            if not options.tiny:
                torch.cuda.empty_cache()
                torch._C._cuda_clearCublasWorkspaces()
    for row in book.rows:
        if row["part"] == "e2e":
            print(
                f"{row['name']:28} {row.get('tok_s', '-'):>10} tok/s {row.get('peak_gb', '-'):>8} GB  first {row.get('first_step_s', '-')} s {row.get('error', '')[:80]}"
            )


if __name__ == "__main__":
    main()
