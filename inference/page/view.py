"""The page itself. Streamlit runs `View.run` once more for each thing that a user does on it; what
lasts lies in `st.session_state`, which is one user's, and in the caches below.

Names, questions and answers are shown as plain text or escaped: a file's name must not become a
link or a picture of another host.
"""

import os
import shutil
import tempfile
import tomllib
import uuid
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit import config, runtime
from streamlit.runtime.scriptrunner import get_script_run_ctx

from dataset.clip import uniform_indices
from dataset.conversation import ConversationError
from dataset.video import MEDIA_SUFFIXES, VideoError, read_frames
from inference.flags import MAX_PAGE_FRAMES, PageFlags
from inference.page.conversation import Attachment, Conversation, SharedModel
from inference.page.visual import draw, escaped
from inference.parts import DEMO_MODEL, ROOT, default_clips, find_models
from inference.request import Sequence
from model.generate import MAX_NEW_TOKENS, Sampling

ICON, USER, ASSISTANT = ":material/movie:", ":material/person:", ":material/movie:"
EXAMPLES = 4
SLIDERS = {  # lowest, highest, default, step
    "temperature": (0.0, 2.0, 0.0, 0.1),
    "top_p": (0.05, 1.0, 0.9, 0.05),
    "top_k": (0, 200, 0, 5),
    "repetition_penalty": (1.0, 2.0, 1.0, 0.05),
}
LANGUAGES = {"en": "English", "zh": "中文"}
HERE = Path(__file__).parent
TEXTS = tomllib.loads(HERE.joinpath("texts.toml").read_text(encoding="utf-8"))


# ---- what users share, and what ends with a session


@st.cache_resource(
    max_entries=2, show_spinner=False, on_release=lambda model: model.scheduler.stop()
)
def load_model(checkpoint: str, changed: float, _flags: PageFlags) -> SharedModel:
    """`changed`: when it was written; a model that was trained again is loaded again."""
    return SharedModel(_flags.load_model(checkpoint))


@st.cache_data(ttl=10, show_spinner=False)
def models_in(folder: str) -> list[str]:
    return [str(path) for path in find_models(folder)]


@st.cache_data(ttl=60, show_spinner=False)
def examples_in(folders: list[str]) -> list[tuple[str, Any]]:
    """Some clips from all over the folders, each with a picture of it."""
    files = [file for folder in folders for file in sorted(Path(folder).iterdir())]
    files = [file for file in files if file.suffix.lower() in MEDIA_SUFFIXES]
    found = []
    for index in uniform_indices(len(files), EXAMPLES):
        with suppress(VideoError):
            found.append((str(files[index]), read_frames(files[index], 1).frames[0]))
    return found


def delete_uploads(uploads: tuple[tempfile.TemporaryDirectory, str]) -> None:
    """Streamlit alone would go on serving what a player fetched, to whoever knows its address."""
    folder, session = uploads
    folder.cleanup()
    if runtime.exists():
        served = runtime.get_instance().media_file_mgr
        served.clear_session_refs(session)
        served.remove_orphaned_files()


@st.cache_resource(scope="session", show_spinner=False, on_release=delete_uploads)
def uploads() -> tuple[tempfile.TemporaryDirectory, str]:
    """A session's files, which go when the connection is cut or the server ends, and its id."""
    return tempfile.TemporaryDirectory(prefix="cinego-page-"), get_script_run_ctx().session_id


def folder_of(conversation: Conversation) -> Path:
    return Path(uploads()[0].name, conversation.key)


def show_wrong_flags() -> None:
    st.error(TEXTS[language_of(st.context.locale)]["wrong_flags"])


# ---- the page


class View:
    def __init__(self, flags: PageFlags):
        self.flags = flags

    def run(self) -> None:
        st.set_page_config(page_title="Cinego", page_icon=ICON, layout="centered")
        self.state = st.session_state
        with st.sidebar:
            self.texts = TEXTS[self._language()]
            st.html(HERE / "style.css")
            chosen = st.selectbox(
                self.texts["model"],
                self._models(),
                format_func=self._name_of,
                key="model",
                help=self.texts["model_help"].format(folder=self.flags.out_dir),
            )
        model = self._load(chosen)
        conversation = self._conversation(model)
        with st.sidebar:
            sampling, num_frames = self._controls(model)
            saving = st.container()
        self._talk(conversation, sampling, num_frames)
        with saving:
            self._saving(conversation)

    def _language(self) -> str:
        if "language" not in self.state:
            self.state.language = language_of(st.context.locale)
        return st.segmented_control(
            "Language · 语言",
            list(LANGUAGES),
            format_func=LANGUAGES.get,
            key="language",
            required=True,
            label_visibility="collapsed",
        )

    # ---- models

    def _models(self) -> list[str]:
        first, found = self.flags.load_from, models_in(self.flags.out_dir)
        if not first:
            return found or [str(DEMO_MODEL)]
        return [first, *(name for name in found if Path(name).resolve() != Path(first).resolve())]

    def _name_of(self, checkpoint: str) -> str:
        path = Path(checkpoint)
        for folder in (self.flags.out_dir, ROOT):
            if path.is_relative_to(folder):
                return str(path.relative_to(folder))
        return checkpoint

    def _load(self, checkpoint: str) -> SharedModel:
        """Stops this run of the page, with the reason, where that can't be."""
        try:
            changed = Path(checkpoint).stat().st_mtime if os.path.exists(checkpoint) else 0.0
            with st.spinner(self.texts["loading"].format(name=self._name_of(checkpoint))):
                return load_model(checkpoint, changed, self.flags)
        except (ValueError, OSError) as error:
            st.error(self.texts["bad_model"])
            st.code(str(error), language=None, wrap_lines=True)
            st.stop()

    def _conversation(self, model: SharedModel) -> Conversation:
        old = self.state.get("conversation")
        if old is None or old.model is not model:
            self._forget(old)
            self.state.conversation = Conversation(model)
        return self.state.conversation

    def _forget(self, conversation: Conversation | None) -> None:
        if conversation is not None:
            shutil.rmtree(folder_of(conversation), ignore_errors=True)
        self.state.conversation, self.state.notices, self.state.draft = None, [], None

    # ---- the sidebar

    def _controls(self, model: SharedModel) -> tuple[Sampling, int]:
        texts, chat_model = self.texts, model.chat_model
        parameters = sum(n for part, n in chat_model.parameters.items() if part != "trainable")
        st.caption(
            texts["model_facts"].format(
                parameters=parameters / 1e6,
                summary=chat_model.model.config.summary,
                frames=chat_model.num_frames,
            )
        )
        st.button(
            texts["reset"],
            icon=":material/refresh:",
            width="stretch",
            on_click=self._forget,
            args=(self.state.conversation,),
        )

        with st.expander(texts["answers"], icon=":material/tune:"):
            longest = self.flags.max_new_tokens
            sliders = {
                name: st.slider(texts[name], *values, key=name, help=texts[f"{name}_help"])
                for name, values in SLIDERS.items()
            }
            sampling = Sampling(
                max_new_tokens=st.number_input(
                    *(texts["max_new_tokens"], 1, longest, min(MAX_NEW_TOKENS, longest)),
                    key="max_new_tokens",
                ),
                seed=st.number_input(
                    texts["seed"], 0, 2**31, 0, key="seed", help=texts["seed_help"]
                ),
                **sliders,
            )
        with st.expander(texts["videos"], icon=":material/theaters:"):
            num_frames = st.slider(
                texts["num_frames"],
                *(1, MAX_PAGE_FRAMES, min(chat_model.num_frames, MAX_PAGE_FRAMES)),
                key=f"num_frames {chat_model.checkpoint}",  # the default is each model's own
                help=texts["num_frames_help"].format(frames=chat_model.num_frames),
            )
            st.caption(self._format("limits"))
        return sampling, num_frames

    def _format(self, text: str) -> str:
        """The page's text of that name, with the limits in its braces."""
        own = self.flags
        limits = {"seconds": own.max_video_seconds, "megapixels": own.max_pixels / 1e6}
        limits |= {"visuals": own.max_visuals, "timeout": own.media_timeout}
        return self.texts[text].format(mib=config.get_option("server.maxUploadSize"), **limits)

    def _saving(self, conversation: Conversation) -> None:
        """Stands behind the answer, of which it writes the end, too."""
        if not conversation.chat.turns:
            return
        st.caption(self.texts["save"])
        kinds = {".md": ("Markdown", "text/markdown"), ".json": ("JSON", "application/json")}
        with st.container(horizontal=True):
            for suffix, (label, mime) in kinds.items():
                text = conversation.chat.format_transcript(suffix)
                how = {"on_click": "ignore", "icon": ":material/download:"}
                st.download_button(label, text, f"cinego{suffix}", mime, **how)

    # ---- the conversation

    def _talk(self, conversation: Conversation, sampling: Sampling, num_frames: int) -> None:
        key = f"ask {conversation.key}"  # a draft goes with its conversation
        if draft := self.state.pop("draft", None):
            self.state[key] = draft
        typed = st.chat_input(
            self.texts["ask"],
            key=key,
            accept_file="multiple",
            file_type=sorted(MEDIA_SUFFIXES),
            max_chars=4000,
            submit_mode="stop",
        )
        question = self.state.pop("pressed", None)
        if typed:
            question = typed.text.strip()
            self._take(conversation, typed.files, num_frames, question)
        chat = conversation.chat
        if not (chat.turns or chat.attached or question):
            self._introduce(conversation, num_frames)
        attachments = iter(conversation.attachments)
        for turn in chat.turns:
            self._user([next(attachments) for _ in turn.visuals], turn.question)
            with st.chat_message("assistant", avatar=ASSISTANT):
                st.text(turn.answer)
                self._times(turn.sequence)
        if chat.attached and not question:
            self._user(attachments)
            self._suggest()
        for notice in self.state.get("notices", ()):
            st.error(notice, icon=":material/error:")
        if question:
            self._user(attachments, question)
            self._answer(conversation, question, sampling)

    def _introduce(self, conversation: Conversation, num_frames: int) -> None:
        st.title("Cinego")
        st.markdown(f"#### {self.texts['lead']}")
        st.markdown(self.texts["intro"])
        st.caption(self._format("limits"))
        examples = examples_in(self.flags.examples or [str(default_clips())])
        if not examples:
            return
        st.markdown(self.texts["examples"])
        with st.container(horizontal=True, key="examples"):
            for number, (path, picture) in enumerate(examples):
                with st.container(width=150, gap="small"):
                    st.image(picture, width=150)
                    if st.button(self.texts["try"], key=f"example {number}", width="stretch"):
                        self._read(conversation, Path(path), Path(path).name, num_frames)
                        st.rerun()

    def _suggest(self) -> None:
        def press(text: str) -> None:
            self.state.pressed, self.state.notices = text, []

        with st.container(horizontal=True):
            for number, text in enumerate(self.texts["suggestions"]):
                st.button(text, key=f"suggestion {number}", on_click=press, args=(text,))

    def _take(self, conversation: Conversation, files, num_frames: int, question: str) -> None:
        """Reads what was attached. Where that fails, the reasons are shown in the next run, and
        the question goes back where it was typed."""
        self.state.notices = []
        folder = folder_of(conversation)
        folder.mkdir(exist_ok=True)
        for file in files:
            # Of the user's name only the suffix is kept: it may be any text.
            path = folder / f"{uuid.uuid4().hex}{Path(file.name).suffix.lower()}"
            path.write_bytes(file.getbuffer())
            if not self._read(conversation, path, file.name, num_frames):
                path.unlink(missing_ok=True)
        if self.state.notices and question:
            self.state.notices[-1] += "\n\n" + self.texts["not_asked"]
            self.state.draft = question
        if self.state.notices or not question:
            st.rerun()  # without the greeting, which this run started with

    def _read(self, conversation: Conversation, path: Path, name: str, num_frames: int) -> bool:
        texts, plain, most = self.texts, escaped(name), self.flags.max_visuals
        try:
            if len(conversation.attachments) < most:
                with st.spinner(texts["reading"].format(name=plain)):
                    limits = self.flags.media_limits(num_frames)
                    conversation.attach(path, name, num_frames, **limits)
                return True
            notice = texts["too_many"].format(name=plain, visuals=most)
        except VideoError as error:
            has_own_fix = error.reason in ("too_large", "too_long", "timeout")
            fix = self._format(error.reason if has_own_fix else "unreadable")
            detail = texts["detail"].format(detail=escaped(error.detail.replace(str(path), name)))
            notice = texts["bad_file"].format(name=plain, fix=fix) + "\n\n" + detail
        self.state.setdefault("notices", []).append(notice)
        return False

    def _answer(self, conversation: Conversation, question: str, sampling: Sampling) -> None:
        with st.chat_message("assistant", avatar=ASSISTANT):
            place, text = st.empty(), ""
            place.caption(self.texts["thinking"])
            # Closed also where Streamlit ends this run: a user who stops it, asks on, or leaves.
            try:
                with closing(conversation.ask(question, sampling)) as pieces:
                    for piece in pieces:
                        text += piece
                        place.text(text)
            except (ConversationError, RuntimeError) as error:
                notice = "failed" if isinstance(error, RuntimeError) else "wrong_question"
                self.state.notices = [self.texts[notice].format(reason=escaped(str(error)))]
                self.state.draft = question
                st.rerun()
            self._times(conversation.chat.last)

    def _user(self, attachments: Iterable[Attachment], question: str = "") -> None:
        with st.chat_message("user", avatar=USER):
            for attachment in attachments:
                draw(attachment, self.texts)
            if question:
                st.text(question)

    def _times(self, sequence: Sequence) -> None:
        line = self.texts["times"].format(
            tokens=sequence.completion_tokens,
            first=sequence.time_to_first_token,
            rate=sequence.tokens_per_second,
        )
        if end := {"length": "cut", "cancelled": "stopped"}.get(sequence.finish_reason):
            line += " · " + self.texts[end]
        st.caption(line)


def language_of(locale: str | None) -> str:
    """The page's language for a browser's, such as "zh-CN"."""
    return "zh" if (locale or "").lower().startswith("zh") else "en"
