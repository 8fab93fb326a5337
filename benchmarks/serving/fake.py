"""An engine's stand-in for trying the benchmark where there is no GPU: answers at a fixed pace, loads any adapter."""

from __future__ import annotations

import asyncio
import json
import sys

from aiohttp import web

TOKEN_S = 0.002


async def completions(request: web.Request) -> web.StreamResponse:
    """Stream as many one-token events as asked, then the usage."""
    asked = await request.json()
    if asked["model"] not in request.app["models"]:
        return web.json_response(
            {"error": {"message": f"The model `{asked['model']}` does not exist."}}, status=404
        )
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    for _ in range(asked["max_tokens"]):
        await asyncio.sleep(TOKEN_S)
        event = {"model": asked["model"], "choices": [{"index": 0, "text": " word"}]}
        await answer.write(f"data: {json.dumps(event)}\n\n".encode())
    usage = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": asked["max_tokens"]}
    await answer.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode())
    await answer.write(b"data: [DONE]\n\n")
    return answer


async def models(request: web.Request) -> web.Response:
    """Names that are served."""
    return web.json_response({"data": [{"id": name} for name in sorted(request.app["models"])]})


async def load(request: web.Request) -> web.Response:
    """Take an adapter's name; the path is not looked at."""
    name = (await request.json())["lora_name"]
    base = request.app["sglang"]
    request.app["models"].add(f"{base}:{name}" if base else name)
    return web.Response(text="ok")


async def unload(request: web.Request) -> web.Response:
    """Forget it."""
    name = (await request.json())["lora_name"]
    base = request.app["sglang"]
    request.app["models"].discard(f"{base}:{name}" if base else name)
    return web.Response(text="ok")


async def health(_: web.Request) -> web.Response:
    """Always."""
    return web.Response()


def main() -> None:
    """``fake.py PORT vllm|sglang BASE [ADAPTER...]``."""
    port, engine, base, *adapters = sys.argv[1:]
    app = web.Application(client_max_size=2**26)
    app["sglang"] = base if engine == "sglang" else None
    app["models"] = {base, *(f"{base}:{a}" if app["sglang"] else a for a in adapters)}
    app.add_routes([
        web.post("/v1/completions", completions), web.get("/v1/models", models), web.get("/health", health),
        web.post("/v1/load_lora_adapter", load), web.post("/v1/unload_lora_adapter", unload),
        web.post("/load_lora_adapter", load), web.post("/unload_lora_adapter", unload),
    ])  # fmt: skip
    web.run_app(app, host="127.0.0.1", port=int(port), print=None)


if __name__ == "__main__":
    main()
