"""Screenshots of the atlas, by the Chromium of the system.

python -m tests.screens                       runs/reference/atlas/*.png
python -m tests.screens --out /tmp/shots

Chromium and its driver are looked for on the path; CHROME and CHROMEDRIVER name others. Needs requirements-browser.txt.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from common import UserError
from runs import atlas

# {name: (page, width, height, colour scheme)}: the map and three methods.
SHOTS = {
    "map": ("index.html", 1280, 1500, "light"),
    "map-phone": ("index.html", 390, 844, "light"),
    "sapo": ("sapo.html", 1280, 2000, "light"),
    "forking_tokens-dark": ("forking_tokens.html", 1280, 2000, "dark"),
    "uqac-phone": ("uqac.html", 390, 1600, "light"),
    "pair": ("pair.html#sapo/gspo", 1280, 1100, "light"),
}


@dataclass
class Options:
    out: str = "runs/reference/atlas"
    """folder of the pictures"""


def found(variable, *names):
    """A program that an environment variable names, or the first of the names that is on the path. UserError."""
    path = os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)
    if not path:
        raise UserError(f"no {names[0]} on the path; {variable} may name one")
    return path


@contextlib.contextmanager
def browser():
    """A headless Chromium that keeps what its console says."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = found("CHROME", "chromium", "google-chrome")
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars", "force-device-scale-factor=1"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found("CHROMEDRIVER", "chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def show(driver, url, width=1280, height=900, scheme="light", scripts=True):
    """Opens a page in a window of that size (CSS pixels), colour scheme, and with JavaScript or without."""
    size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=[dict(name="prefers-color-scheme", value=scheme)]))
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", dict(value=not scripts))
    driver.get("about:blank")  # or another fragment of the same page would not be loaded anew
    driver.get(url)


def main(options):
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, browser() as driver:
        site = Path(folder) / "atlas"
        atlas.main(atlas.Options(out=str(site)))
        for name, (page, width, height, scheme) in SHOTS.items():
            show(driver, f"{site.as_uri()}/{page}", width, height, scheme)
            driver.save_screenshot(str(out / f"{name}.png"))
            print(f"wrote {out / name}.png")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
