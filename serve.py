"""Serves a trained model to OpenAI's client library and whatever else speaks its API.

    python serve.py                                           # out/sft_videolm_512.pth, port 8000
    python serve.py --load_from out/quickstart/sft.pth
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "cinego", "messages": [{"role": "user", "content": "Hello!"}]}'

Videos come inside of the request as data: URLs. docs/serving.md has the rest: clients, limits, and
what opens local files and other hosts. Of a request it logs path and status, never content.
"""

import sys

from cli import launch, parse_flags
from inference.flags import ServerFlags

# The model is imported once the flags are right: --help and its errors come at once.


def main() -> None:
    flags = parse_flags(ServerFlags, __doc__)
    import uvicorn

    from inference.server.app import build_app
    from inference.server.connections import LimitedH11Protocol

    if not flags.is_local and flags.api_key is None:
        print("open to the network without --api_key: anyone may ask", file=sys.stderr)
    LimitedH11Protocol.header_timeout = flags.header_timeout
    LimitedH11Protocol.most = 4 * flags.max_queue
    uvicorn.run(
        build_app(flags),
        host=flags.host,
        port=flags.port,
        http=LimitedH11Protocol,
        ws="none",
        server_header=False,
        proxy_headers=flags.trusted_proxies is not None,
        forwarded_allow_ips=flags.trusted_proxies,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=flags.stop_timeout,
    )


if __name__ == "__main__":
    launch(main)
