"""How a video or an image looks on the page: its player, its frames and their weights."""

import html
import re

import streamlit as st

from inference.page.conversation import Attachment

PLAYED = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mp4", ".webm": "webm"}  # by browsers
MOVING_PICTURES = (".gif", ".webp", ".png")


def draw(attachment: Attachment, texts: dict[str, str]) -> None:
    """A frame around its player and, under each sampled frame, its weight."""
    taken = len(attachment.pictures)
    with st.container(border=True):
        facts = (texts["facts"] if taken == 1 else texts["facts_video"]).format(
            width=attachment.info.width,
            height=attachment.info.height,
            seconds=attachment.info.seconds or attachment.visual.timestamps[-1],
            taken=taken,
            total=attachment.num_frames_total,
        )
        st.markdown(f"**{escaped(attachment.visual.name)}** :gray[:small[{facts}]]")
        _play(attachment, texts)
        if times := attachment.visual.damaged_near:
            st.warning(texts["damaged"].format(times=times))
        if attachment.visual.unlike_training:
            st.warning(texts["unlike"])
        if taken > 1:
            st.caption(texts["strip"], help=texts["strip_help"])
            st.html(strip(attachment, texts))


def _play(attachment: Attachment, texts: dict[str, str]) -> None:
    suffix, is_there = attachment.path.suffix.lower(), attachment.path.is_file()
    # Not larger than 360 x 240 pixels, whichever way it stands.
    width, height = attachment.poster.size
    width = max(1, round(min(360, 240 * width / height)))
    if len(attachment.pictures) == 1:
        st.image(attachment.poster, width=width)
    elif is_there and suffix in PLAYED:
        st.video(str(attachment.path), f"video/{PLAYED[suffix]}", width=width)
    elif is_there and suffix in MOVING_PICTURES:
        st.image(str(attachment.path), width=width)
    else:
        st.image(attachment.poster, width=width)
        st.caption(texts["not_played" if is_there else "gone"])


def strip(attachment: Attachment, texts: dict[str, str]) -> str:
    """HTML: the frames side by side, under each its weight as a colour, and its second."""
    most, cells = max(attachment.weights), []
    for picture, seconds, weight in zip(
        attachment.pictures, attachment.visual.timestamps, attachment.weights, strict=True
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
