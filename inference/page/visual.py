"""How a video or an image stands on the page: its player, its frames, what hangs on each."""

import html
import re

import streamlit as st

from inference.page.conversation import Shown

PLAYED = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mp4", ".webm": "webm"}  # by browsers
MOVING_PICTURES = (".gif", ".webp", ".png")


def show(shown: Shown, texts: dict[str, str]) -> None:
    """A frame around its player and, under each sampled frame, how much hangs on it."""
    taken = len(shown.pictures)
    with st.container(border=True):
        facts = (texts["facts"] if taken == 1 else texts["facts_video"]).format(
            width=shown.info.width,
            height=shown.info.height,
            seconds=shown.info.seconds or shown.visual.timestamps[-1],
            taken=taken,
            total=shown.num_frames_total,
        )
        st.markdown(f"**{escaped(shown.name)}** :gray[:small[{facts}]]")
        _play(shown, texts)
        if taken > 1:
            st.caption(texts["strip"], help=texts["strip_help"])
            st.html(strip(shown, texts))


def _play(shown: Shown, texts: dict[str, str]) -> None:
    suffix, is_there = shown.file.suffix.lower(), shown.file.is_file()
    # Not larger than 360 x 240 pixels, whichever way it stands.
    width, height = shown.poster.size
    width = max(1, round(min(360, 240 * width / height)))
    if len(shown.pictures) == 1:
        st.image(shown.poster, width=width)
    elif is_there and suffix in PLAYED:
        st.video(str(shown.file), f"video/{PLAYED[suffix]}", width=width)
    elif is_there and suffix in MOVING_PICTURES:
        st.image(str(shown.file), width=width)
    else:
        st.image(shown.poster, width=width)
        st.caption(texts["not_played" if is_there else "gone"])


def strip(shown: Shown, texts: dict[str, str]) -> str:
    """HTML: the frames side by side, under each its weight as a colour, and its second."""
    most, cells = max(shown.weights), []
    for picture, seconds, weight in zip(
        shown.pictures, shown.visual.timestamps, shown.weights, strict=True
    ):
        about = html.escape(texts["frame"].format(seconds=seconds, percent=100 * weight))
        cells.append(
            f'<div class="cinego-frame" title="{about}"><img src="{picture}" alt="{about}">'
            f'<div class="cinego-heat"><i style="opacity:{weight / most:.2f}"></i>'
            f"<b>{100 * weight:.0f} %</b></div><time>{seconds:.1f} s</time></div>"
        )
    width = f"max-width: {9 * len(cells)}rem"  # a few frames don't fill the page
    return f'<div class="cinego-strip" style="{width}">{"".join(cells)}</div>'


def escaped(text: str) -> str:
    """Markdown that shows `text` as it is."""
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|~$:&^=])", r"\\\1", " ".join(text.split()))
