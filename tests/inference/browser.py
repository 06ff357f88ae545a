"""The page as its users meet it: a streamlit process of its own, and Chromium in front of it.

python -m tests.inference.browser docs/page.png --example 2    # takes the picture in docs/web.md
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.inference.service import Service

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
MISSING = None
if not (CHROMIUM and CHROMEDRIVER):
    MISSING = "no Chromium with its driver: apt-get install chromium chromium-driver"
# Notes each text that an element ever had, as a user sees it grow.
WATCH = """
window.seen = [];
new MutationObserver(() => {
    const found = document.querySelectorAll('[data-testid="stText"]');
    const text = found.length ? found[found.length - 1].textContent : '';
    if (text !== window.seen[window.seen.length - 1]) window.seen.push(text);
}).observe(document.body, {childList: true, subtree: true, characterData: true});
"""


class Page(Service):
    """`streamlit run web_demo.py`."""

    def __init__(self, folder: Path, *flags, **options):
        given = [f"--server.{name}={value}" for name, value in options.items()]
        command = [sys.executable, "-m", "streamlit", "run", "web_demo.py", *given]
        command += ["--server.port=0", "--server.headless=true", "--", *flags]
        super().__init__(command, folder)

    def uploads(self) -> list[Path]:
        return [path for path in self.temporary.rglob("*") if path.is_file()]


class Browser:
    """One user's browser: nothing is shared with another one."""

    def __init__(self, profile: Path, width: int = 1280, height: int = 900, language: str = "en"):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (
            *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
            *("disable-background-networking", "disable-component-update", "disable-sync"),
            *("disable-dev-shm-usage", "hide-scrollbars"),
            *(f"user-data-dir={profile}", f"window-size={width},{height}"),
        ):
            options.add_argument(f"--{flag}")
        options.add_experimental_option("prefs", {"intl.accept_languages": language})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))

    def open(self, url: str) -> None:
        self.driver.get(url)
        self.until(lambda: self.all('[data-testid="stChatInputTextArea"]'), "a place to type")

    def until(self, condition, what: str, seconds: float = 300):
        try:
            return WebDriverWait(self.driver, seconds, 0.1).until(lambda _: condition())
        except TimeoutException as error:
            raise TimeoutException(f"still without {what} on {self.text()[-2000:]!r}") from error

    def all(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self) -> str:
        return self.driver.execute_script("return document.body.innerText")

    def see(self, text: str) -> None:
        self.until(lambda: text in self.text(), repr(text))

    def is_at_rest(self) -> bool:
        return bool(self.all('[data-testid="stApp"][data-test-script-state="notRunning"]'))

    def rest(self) -> None:
        """Until the page has nothing under way."""
        self.until(self.is_at_rest, "a page at rest")

    def answers(self) -> list[str]:
        """All of them; none while the page is at work."""
        texts = self.driver.execute_script(
            "return [...document.querySelectorAll('[data-testid=\"stChatMessage\"]')]"
            ".map(it => [...it.querySelectorAll('[data-testid=\"stText\"]')]"
            ".map(text => text.textContent).join(''))"
        )
        return texts[1::2] if self.is_at_rest() else []

    def press(self, label: str) -> None:
        buttons = [it for it in self.all('[data-testid="stButton"] button') if label in it.text]
        buttons[0].click()

    def start_new(self) -> None:
        """A new conversation. It has a place to type of its own: a file in the old one is lost."""
        self.press("New conversation")
        self.until(lambda: not self.all('[data-testid="stChatMessage"]'), "a new conversation")
        self.rest()

    def choose(self, *files: Path) -> None:
        self._only('[data-testid="stChatInput"] input[type="file"]').send_keys(
            "\n".join(map(str, files))
        )

    def _only(self, selector: str):
        """The one such element; a new conversation has two for a moment, its own and the last's."""
        self.until(lambda: len(self.all(selector)) == 1, f"a single {selector}")
        return self.all(selector)[0]

    def attach(self, *files: Path) -> None:
        """Chooses files and waits until they are sent."""
        self.choose(*files)
        chips = "[data-testid=stFileChip]"
        self.until(
            lambda: (
                len(self.all(chips)) == len(files)
                and not self.all("[data-testid=stFileChipIconSpinner]")
            ),
            f"{len(files)} files attached",
        )

    def say(self, text: str) -> None:
        self._only('[data-testid="stChatInputTextArea"]').send_keys(text, Keys.ENTER)

    def shoot(self, path: Path) -> None:
        self.driver.save_screenshot(str(path))

    def quit(self) -> None:
        if self.driver.session_id is not None:
            self.driver.quit()
            self.driver.session_id = None


def take_picture(picture: Path, example: int) -> None:
    """Of an example and the answer about it, by the model that stands first."""
    with tempfile.TemporaryDirectory() as folder:
        page = Page(Path(folder, "page"))
        browser = Browser(Path(folder, "profile"), 1180, 940)
        try:
            browser.open(page.url)
            browser.until(lambda: browser.all(".st-key-examples img"), "examples")
            browser.rest()
            browser.all(".st-key-examples [data-testid=stButton] button")[example].click()
            browser.until(lambda: browser.all(".cinego-frame"), "frames")
            browser.rest()
            browser.press("What happens")
            browser.until(browser.answers, "an answer")
            ready = "return document.querySelector('video').readyState === 4"
            browser.until(lambda: browser.driver.execute_script(ready), "a film to play")
            time.sleep(2)  # the player's own signs of loading fade
            browser.shoot(picture)
        finally:
            browser.quit()
            page.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("--example", type=int, default=0, help="which of those on the page")
    arguments = parser.parse_args()
    take_picture(arguments.picture, arguments.example)
