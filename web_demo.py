"""A page in the browser to talk to a trained model about videos and images.

    streamlit run web_demo.py                                   # the models in out/
    streamlit run web_demo.py -- --load_from out/quickstart/sft.pth
    streamlit run web_demo.py --server.port 8600 -- --max_video_seconds 60

Streamlit's own options stand before `--` (.streamlit/config.toml has their defaults: this machine
only, files of up to 32 MiB), those below after it. docs/web.md says what the page shows and what it
keeps.
"""

import shlex
import shutil
import sys

from streamlit import runtime

from cli import launch, parse_flags
from inference.flags import PageFlags


def main() -> None:
    if not runtime.exists():  # python web_demo.py
        parse_flags(PageFlags, __doc__)  # answers --help, and says what is wrong with flags
        flags = ["--", *sys.argv[1:]] if sys.argv[1:] else []
        streamlit = (
            ["streamlit"] if shutil.which("streamlit") else [sys.executable, "-m", "streamlit"]
        )
        command = shlex.join([*streamlit, "run", "web_demo.py", *flags])
        raise SystemExit(f"web_demo.py: streamlit runs this page; type:\n\n    {command}\n")
    from inference.page.view import View, show_wrong_flags

    try:
        flags = parse_flags(PageFlags, __doc__)
    except ValueError as error:  # the terminal hears what is wrong, the page only that it is
        print(f"web_demo.py: {error}", file=sys.stderr)
        show_wrong_flags()
    else:
        View(flags).run()


if __name__ == "__main__":
    launch(main)
