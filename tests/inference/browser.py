"""The page as its users meet it: a streamlit process of its own, and Chromium in front of it."""

import shutil
import sys
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

    def __init__(self, profile: Path, language: str):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (
            *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
            *("disable-background-networking", "disable-component-update", "disable-sync"),
            *("disable-dev-shm-usage", "hide-scrollbars"),
            *(f"user-data-dir={profile}", "window-size=1280,900"),
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

    def is_at_rest(self) -> bool:
        return bool(self.all('[data-testid="stApp"][data-test-script-state="notRunning"]'))

    def answers(self) -> list[str]:
        """All of them; none while the page is at work."""
        texts = self.driver.execute_script(
            "return [...document.querySelectorAll('[data-testid=\"stChatMessage\"]')]"
            ".map(it => [...it.querySelectorAll('[data-testid=\"stText\"]')]"
            ".map(text => text.textContent).join(''))"
        )
        return texts[1::2] if self.is_at_rest() else []

    def start_new(self) -> None:
        """A new conversation. It has a place to type of its own: a file in the old one is lost."""
        buttons = self.all('[data-testid="stButton"] button')
        next(button for button in buttons if "New conversation" in button.text).click()
        self.until(lambda: not self.all('[data-testid="stChatMessage"]'), "a new conversation")
        self.until(self.is_at_rest, "a page at rest")

    def choose(self, file: Path) -> None:
        self._only('[data-testid="stChatInput"] input[type="file"]').send_keys(str(file))

    def _only(self, selector: str):
        """The one such element; a new conversation has two for a moment, its own and the last's."""
        self.until(lambda: len(self.all(selector)) == 1, f"a single {selector}")
        return self.all(selector)[0]

    def attach(self, file: Path) -> None:
        """Chooses a file and waits until it is sent."""
        self.choose(file)
        self._only("[data-testid=stFileChip]")
        spinner = "[data-testid=stFileChipIconSpinner]"
        self.until(lambda: not self.all(spinner), f"{file} attached")

    def say(self, text: str) -> None:
        self._only('[data-testid="stChatInputTextArea"]').send_keys(text, Keys.ENTER)

    def quit(self) -> None:
        if self.driver.session_id is not None:
            self.driver.quit()
            self.driver.session_id = None
