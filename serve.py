"""Serves a trained model to OpenAI's client library and whatever else speaks its API.

    python serve.py                                           # out/sft_videolm_512.pth, port 8000
    python serve.py --load_from out/quickstart/sft.pth
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "cinego", "messages": [{"role": "user", "content": "Hello!"}]}'

Videos come inside of the request as data: URLs. docs/serving.md has the rest: clients, limits, and
what opens local files and other hosts. Of a request it writes down path and status, never content.
"""

import sys

from cli import launch, parse_flags
from inference.server.settings import Settings

# The model is imported once the flags are right: --help and its errors come at once.


def main(settings: Settings) -> None:
    import uvicorn

    from inference.server.app import build_app

    if not settings.is_local and settings.api_key is None:
        print("open to the network without --api_key: anyone may ask", file=sys.stderr)
    uvicorn.run(
        build_app(settings),
        host=settings.host,
        port=settings.port,
        http="h11",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=settings.stop_timeout,
        # Connections that never say a word end here: those above get 503 at once.
        limit_concurrency=4 * settings.max_queue + 64,
    )


if __name__ == "__main__":
    launch(lambda: main(parse_flags(Settings, __doc__)))
