"""Requests a second of the HTTP backend, of aiohttp and of the openai SDK, against one local server, in one
run.

    python speed/client.py            # makes speed/.venv with the peers first

The server answers every request after --latency seconds; every client sends the same picture and text (about
150 kB a request, read and encoded anew each time) with --in_flight requests under way. Rounds alternate; the
median counts.

Writes  --result (results/client.json; with --growth results/client_growth.json)
Prints  the same JSON object: requests a second, client CPU a request, ratios
"""
import argparse
import asyncio
import base64
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / "speed" / ".venv"
CLIENTS = ("ours", "openai", "aiohttp")
# requests, pixels of a picture's longer side
GROWTH = [(750, 560), (3000, 560), (12000, 560), (750, 1120), (750, 2240)]
TEXT = "Describe the region in one to three sentences. " * 40
COMPLETION = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [
    {"index": 0, "message": {"role": "assistant", "content": '{"caption": "a cat"}'},
     "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 900, "completion_tokens": 30, "total_tokens": 930}}


def serve(latency: float) -> None:
    """Answer every POST with the same completion after `latency` seconds; print the port."""
    from aiohttp import web
    body = json.dumps(COMPLETION).encode()

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(latency)
        return web.Response(body=body, content_type="application/json")

    async def start() -> None:
        app = web.Application(client_max_size=2**24)
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        print(site._server.sockets[0].getsockname()[1], flush=True)
        await asyncio.Event().wait()

    asyncio.run(start())


def messages(picture: str) -> list[dict]:
    url = f"data:image/jpeg;base64,{base64.b64encode(Path(picture).read_bytes()).decode('ascii')}"
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}},
                                         {"type": "text", "text": TEXT}]}]


def ask_ours(url: str, picture: str, n: int, in_flight: int) -> None:
    sys.path.insert(0, str(ROOT))
    from utils.backends import Request
    from utils.openai_backend import HttpBackend
    backend = HttpBackend("m", [url], 10**7, concurrency=in_flight)
    requests = [Request(f"{i:064x}", None, TEXT, (picture,), 100) for i in range(n)]
    assert sum(reply.error is None for reply in backend.generate(requests)) == n


def ask_aiohttp(url: str, picture: str, n: int, in_flight: int) -> None:
    import aiohttp

    async def run() -> None:
        free = asyncio.Semaphore(in_flight)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=in_flight)) as session:
            async def one() -> None:
                async with free:
                    data = json.dumps({"model": "m", "messages": messages(picture), "max_tokens": 100})
                    async with session.post(f"{url}/chat/completions", data=data) as response:
                        assert (await response.json())["choices"]
            await asyncio.gather(*(one() for _ in range(n)))
    asyncio.run(run())


def ask_openai(url: str, picture: str, n: int, in_flight: int) -> None:
    import openai

    async def run() -> None:
        free = asyncio.Semaphore(in_flight)
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            async def one() -> None:
                async with free:
                    done = await client.chat.completions.create(model="m", messages=messages(picture),
                                                                max_tokens=100)
                    assert done.choices
            await asyncio.gather(*(one() for _ in range(n)))
    asyncio.run(run())


def measure(name: str, args: argparse.Namespace, url: str, picture: str) -> dict:
    """Run one client in a process of its own; return its requests a second and CPU milliseconds a request."""
    command = [sys.executable, __file__, "--client", name, "--url", url, "--picture", picture, "--requests",
               str(args.requests), "--in_flight", str(args.in_flight)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE,
                                     text=True).stdout.splitlines()[-1])


def run_client(args: argparse.Namespace) -> None:
    ask = {"ours": ask_ours, "aiohttp": ask_aiohttp, "openai": ask_openai}[args.client]
    ask(args.url, args.picture, args.in_flight, args.in_flight)  # connections are opened, code is loaded
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    ask(args.url, args.picture, args.requests, args.in_flight)
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"requests_per_s": args.requests / seconds, "cpu_ms": 1000 * cpu / args.requests}))


def compare(args: argparse.Namespace) -> dict:
    """Return the medians of all clients over the rounds, and the ratios; with --growth at every point, a
    round each."""
    if args.growth:
        points = []
        for args.requests, args.side in GROWTH:
            points.append(compare(argparse.Namespace(**vars(args) | {"growth": False, "rounds": 1})))
            print(json.dumps(points[-1]), file=sys.stderr)
        return {"points": points}
    from PIL import Image
    with tempfile.TemporaryDirectory() as folder:
        picture = str(Path(folder, "picture.jpg"))
        Image.effect_noise((args.side, args.side * 3 // 4), 60).convert("RGB").save(picture,
                                                                                    quality=args.quality)
        server = subprocess.Popen([sys.executable, __file__, "--serve", "--latency", str(args.latency)],
                                  stdout=subprocess.PIPE, text=True)
        try:
            url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
            rounds = [{name: measure(name, args, url, picture) for name in CLIENTS}
                      for _ in range(args.rounds)]
        finally:
            server.kill()
            server.wait()
        size = len(json.dumps(messages(picture)))
    found = {name: {key: round(statistics.median(one[name][key] for one in rounds), 2)
                    for key in ("requests_per_s", "cpu_ms")} for name in CLIENTS}
    rates = {name: part["requests_per_s"] for name, part in found.items()}
    return {"clients": found, "ours_to_openai": round(rates["ours"] / rates["openai"], 2),
            "ours_to_aiohttp": round(rates["ours"] / rates["aiohttp"], 2), "request_kb": round(size / 1000),
            "latency_s": args.latency, "in_flight": args.in_flight, "requests": args.requests,
            "rounds": args.rounds,
            "cpus": os.cpu_count()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000, help="a client and round")
    parser.add_argument("--in_flight", type=int, default=256, help="requests under way")
    parser.add_argument("--latency", type=float, default=0.3, help="seconds until the server answers")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--quality", type=int, default=75, help="of the JPEG: sets the size of a request")
    parser.add_argument("--side", type=int, default=560, help="pixels, of the picture's longer side")
    parser.add_argument("--growth", action="store_true", help="more requests and larger pictures instead")
    parser.add_argument("--result", help="where the numbers go")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--client", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--picture", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.latency)
    if args.client:
        return run_client(args)
    if Path(sys.prefix) != VENV:
        if not (VENV / "installed").exists():
            venv.create(VENV, with_pip=True, clear=True)
            subprocess.run([VENV / "bin" / "pip", "install", "--quiet", "-r", ROOT / "speed"
                            / "requirements.txt"], check=True)
            (VENV / "installed").touch()
        raise SystemExit(subprocess.run([VENV / "bin" / "python", __file__, *sys.argv[1:]]).returncode)
    result = compare(args)
    path = Path(args.result or ROOT / "results" / ("client_growth.json" if args.growth else "client.json"))
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
