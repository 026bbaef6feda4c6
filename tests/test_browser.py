"""The atlas in headless Chromium: it opens, finds, folds and compares, on a phone, in the dark, and without JavaScript."""

import re
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from runs import atlas
from tests import screens, sync

NAMES = sync.scripts()
METHODS = ("sapo", "forking_tokens", "uqac", "poad", "decode")  # of several families, one with a base that has no base, a root


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "atlas"
    atlas.main(atlas.Options(out=str(out)))
    return out


@pytest.fixture(scope="session")
def driver():
    with screens.browser() as found:
        yield found


@pytest.fixture
def open_(site, driver):
    """f(page, ...) as screens.show() -> the driver."""

    def opened(page, **how):
        screens.show(driver, f"{site.as_uri()}/{page}", **how)
        return driver

    return opened


def seen(driver):
    """Names of the methods on the map that can be seen and are no mere way to another one."""
    items = driver.find_elements(By.CSS_SELECTOR, "li.method:not(.aside)")
    return [item.get_attribute("id") for item in items if item.is_displayed()]


BROKEN = """const done = arguments[0], eager = (i) => { i.loading = "eager"; return i.decode().then(() => null, () => i.src); };
Promise.all([...document.images].map(eager)).then((found) => done(found.filter(Boolean)));"""


def test_every_page_opens_and_the_console_stays_empty(site, open_):
    pages = sorted(path.name for path in site.glob("*.html"))
    assert {f"{name}.html" for name in NAMES} | {"index.html", "pair.html"} == set(pages)
    for page in pages:
        driver = open_(page)
        assert driver.get_log("browser") == [], page
        assert driver.title and driver.find_element(By.TAG_NAME, "h1").is_displayed()
        assert driver.execute_async_script(BROKEN) == [], page


def test_search_and_filters(open_):
    driver = open_("index.html")
    assert sorted(seen(driver)) == sorted(NAMES)
    find = driver.find_element(By.ID, "find")
    find.send_keys("clip")
    clip = seen(driver)
    assert {"dapo", "sapo", "cispo"} <= set(clip) and len(clip) < len(NAMES)
    assert driver.find_element(By.ID, "found").text == f"{len(clip)} of {len(NAMES)} scripts"
    find.clear()
    find.send_keys("no such word")
    assert seen(driver) == [] and driver.find_element(By.ID, "found").text == f"0 of {len(NAMES)} scripts"
    find.clear()
    find.send_keys(" ")  # a cleared field alone tells the page nothing
    assert sorted(seen(driver)) == sorted(NAMES)
    Select(driver.find_element(By.ID, "costs")).select_by_value("critic")
    critics = seen(driver)
    assert {"ppo", "t_ppo", "poad"} <= set(critics) and "sapo" not in critics
    Select(driver.find_element(By.ID, "changes")).select_by_visible_text("advantages")
    changes = {n: driver.find_element(By.ID, n).get_attribute("data-changes").split("|") for n in critics}
    assert seen(driver) == [n for n in critics if "advantages" in changes[n]] != critics
    for field in ("costs", "changes"):
        Select(driver.find_element(By.ID, field)).select_by_value("")
    word = Select(driver.find_element(By.ID, "verdict")).options[1].text
    Select(driver.find_element(By.ID, "verdict")).select_by_visible_text(word)
    told = {n: driver.find_element(By.ID, n).get_attribute("data-verdict") for n in NAMES}
    assert set(seen(driver)) == {n for n in NAMES if told[n] == word} != set()


def test_what_is_the_same_folds(open_):
    driver = open_("sapo.html")
    fold = driver.find_element(By.CSS_SELECTOR, "details")
    code = fold.find_element(By.TAG_NAME, "pre")
    assert not code.is_displayed()
    fold.find_element(By.TAG_NAME, "summary").click()
    assert code.is_displayed() and code.text.strip()
    fold.find_element(By.TAG_NAME, "summary").click()
    assert not code.is_displayed()


def test_two_side_by_side(open_):
    driver = open_("index.html#sapo/gspo")
    assert driver.current_url.endswith("pair.html#sapo/gspo")
    left, right = (Select(driver.find_element(By.ID, side)) for side in ("left", "right"))
    assert [s.first_selected_option.get_attribute("value") for s in (left, right)] == ["sapo", "gspo"]
    parts = [h.text for h in driver.find_elements(By.CSS_SELECTOR, "#out h2")]
    assert "surrogate" in parts and not any(part.startswith("train") for part in parts)
    assert any("train" in s.text for s in driver.find_elements(By.CSS_SELECTOR, "#out summary"))
    marked = "".join(e.get_attribute("textContent") for e in driver.find_elements(By.CSS_SELECTOR, "#out del"))
    assert "sigmoid" in marked  # sapo's gate, which gspo has not
    right.select_by_value("sapo")
    assert driver.current_url.endswith("#sapo/sapo")
    assert not driver.find_elements(By.CSS_SELECTOR, "#out h2, #out del, #out ins")
    right.select_by_value("ppo")
    driver.find_element(By.ID, "swap").click()
    assert driver.current_url.endswith("#ppo/sapo") and driver.find_elements(By.CSS_SELECTOR, "#out ins")
    assert driver.get_log("browser") == []


@pytest.mark.parametrize("page", ["index.html", "pair.html#sapo/gspo", *(f"{name}.html" for name in METHODS)])
def test_a_phone_scrolls_one_way(open_, page):
    driver = open_(page, width=390, height=844)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 390


def luminance(colour):
    """Of a CSS colour rgb(...), as WCAG 2 defines it."""
    channels = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


BEHIND = """const out = [];
for (const e of document.querySelectorAll('p, a, h1, h2, h3, li, td, th, summary, code span, .verdict, label')) {
  if (!e.checkVisibility() || ![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
  let at = e;
  while (at && getComputedStyle(at).backgroundColor === 'rgba(0, 0, 0, 0)') at = at.parentElement;
  const behind = at ? getComputedStyle(at).backgroundColor : 'rgb(255, 255, 255)';
  out.push([getComputedStyle(e).color, behind, e.textContent.trim().slice(0, 40)]);
}
return out;"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", ["index.html", "sapo.html", "uqac.html"])
def test_text_can_be_read_in_both_schemes(open_, page, scheme):
    """A contrast of 4.5 at least between text and what is behind it (WCAG 2, AA)."""
    driver = open_(page, scheme=scheme)
    body = driver.execute_script("return getComputedStyle(document.documentElement).backgroundColor")
    shown = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    ground = luminance(body if body != "rgba(0, 0, 0, 0)" else shown)
    assert ground > 0.8 if scheme == "light" else ground < 0.1
    found = {(front, back): text for front, back, text in driver.execute_script(BEHIND) if back.startswith("rgb(")}
    assert len(found) > 3
    for (front, back), text in found.items():
        high, low = sorted((luminance(front), luminance(back)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (front, back, text)


def test_without_javascript(open_):
    driver = open_("index.html", scripts=False)
    names = [item.get_attribute("id") for item in driver.find_elements(By.CSS_SELECTOR, "li.method") if item.is_displayed()]
    assert sorted(names) == sorted(NAMES) and not driver.find_element(By.ID, "find").is_displayed()
    driver = open_("sapo.html", scripts=False)
    fold = driver.find_element(By.CSS_SELECTOR, "details")
    fold.find_element(By.TAG_NAME, "summary").click()
    assert fold.find_element(By.TAG_NAME, "pre").is_displayed()
    assert "sigmoid" in driver.find_element(By.CSS_SELECTOR, ".lesson").text
    driver = open_("pair.html", scripts=False)
    assert "needs JavaScript" in driver.find_element(By.TAG_NAME, "main").text


def test_a_keyboard_reaches_the_text_and_the_search(open_):
    from selenium.webdriver.common.keys import Keys

    driver = open_("index.html")
    driver.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    skip = driver.switch_to.active_element
    assert skip.get_attribute("href").endswith("#main") and skip.is_displayed()
    reached = []
    for _ in range(40):
        driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(driver.switch_to.active_element.get_attribute("id"))
    assert {"find", "changes", "costs", "verdict"} <= set(reached)


def test_the_committed_screenshots_are_of_pages_that_there_are(site):
    folder = Path(sync.ROOT / "runs" / "reference" / "atlas")
    assert {path.stem for path in folder.glob("*.png")} == set(screens.SHOTS)
    assert all((site / page.partition("#")[0]).exists() for page, *_ in screens.SHOTS.values())
