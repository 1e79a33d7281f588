"""A headless Chromium for the tests of pages: it is started once, waited for with bounds, and always ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["Browser", "missing", "started"]

_SECONDS = 30
_PROGRAMS = {"chromium": ("chromium", "chromium-browser", "google-chrome"), "driver": ("chromedriver",)}
_ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--no-default-browser-check", "--window-size=1300,1000", "--force-device-scale-factor=1", "--hide-scrollbars",
)  # fmt: skip


def missing() -> str:
    """What is not there of what a test needs; empty if everything is."""
    lacking = [name for name in _PROGRAMS if _program(name) is None]
    try:
        import selenium  # noqa: F401
    except ImportError:
        lacking.append("selenium")
    return f"{' and '.join(lacking)} not found" if lacking else ""


class Browser:
    """One page at a time, and what happened on it."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._requests: list[str] = []

    def open(self, path: Path) -> None:
        """Load a file; its script has run to its end when this returns."""
        self.errors()
        self.requests()
        self._driver.get(path.as_uri())
        self.until("document.documentElement.dataset.ready === 'yes'")

    def js(self, script: str, *arguments: Any) -> Any:
        """Run a function's body in the page; the result of its ``return``."""
        return self._driver.execute_script(script, *arguments)

    def until(self, condition: str) -> None:
        """Wait until an expression is true; TimeoutException after 30 s."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self._driver, _SECONDS, poll_frequency=0.05).until(lambda _: self.js(f"return {condition}"))

    def drawn(self) -> None:
        """Wait until all that was asked for has been drawn."""
        self._driver.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))"
        )

    def command(self, name: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._driver.execute("executeCdpCommand", {"cmd": name, "params": parameters})["value"]

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """A mouse event at a place of the window."""
        self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def key(self, key: str) -> None:
        """Press and release a key, on whatever has the focus."""
        text = {"text": key} if len(key) == 1 else {}
        self.command("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.command("Input.dispatchKeyEvent", type="keyUp", key=key)

    def scheme(self, name: str) -> None:
        """Let the page believe in a light or dark scheme."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.command("Emulation.setEmulatedMedia", features=features)

    def size(self, width: int, height: int = 1000) -> None:
        """Change the window's inner size."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def text(self, identity: str) -> str:
        """Text of an element."""
        said: str = self.js("return document.getElementById(arguments[0]).textContent", identity)
        return said

    def dialog(self) -> str | None:
        """Text of an open dialog."""
        from selenium.common.exceptions import NoAlertPresentException

        try:
            return str(self._driver.switch_to.alert.text)
        except NoAlertPresentException:
            return None

    def errors(self) -> list[str]:
        """What the console said since the last call, but for plain messages."""
        entries = self._driver.execute("getLog", {"type": "browser"})["value"]
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call."""
        entries = self._driver.execute("getLog", {"type": "performance"})["value"]
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@contextmanager
def started() -> Iterator[Browser]:
    """A browser of its own with a profile of its own; nothing of it is left afterwards."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.chromium.remote_connection import ChromiumRemoteConnection
    from selenium.webdriver.remote.client_config import ClientConfig

    profile = tempfile.mkdtemp(prefix="moe_eplb_browser_")
    options = webdriver.ChromeOptions()
    options.binary_location = str(_program("chromium"))
    for argument in (*_ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.set_capability("unhandledPromptBehavior", "ignore")
    service = Service(str(_program("driver")), popen_kw={"start_new_session": True})
    driver = None
    try:
        service.start()
        bounds = ClientConfig(service.service_url, timeout=_SECONDS)
        executor = ChromiumRemoteConnection(service.service_url, "goog", "chrome", client_config=bounds)
        driver = webdriver.Remote(command_executor=executor, options=options)
        driver.set_page_load_timeout(_SECONDS)
        driver.set_script_timeout(_SECONDS)
        yield Browser(driver)
    finally:
        _end(driver, service, profile)


def _end(driver: Any, service: Any, profile: str) -> None:
    try:
        if driver is not None:
            driver.quit()
    finally:
        try:
            service.stop()
        finally:
            for process in _with(profile):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            shutil.rmtree(profile, ignore_errors=True)


def _with(profile: str) -> list[int]:
    """Processes that were given this profile: they are this browser's, whatever became of their parents."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if profile.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return [process for process in found if process != os.getpid()]


def _program(name: str) -> str | None:
    return next((path for program in _PROGRAMS[name] if (path := shutil.which(program))), None)
