"""The search page in a real browser, over a real server with a fake model."""

import re
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import uvicorn
from playwright.sync_api import Browser, Locator, Page, ViewportSize, expect, sync_playwright
from service_fakes import FIRST_ID, FakeRunner, fake_deployment, fake_engine, fake_settings

from onesearch.catalog import Filters
from service.app import create_app
from service.deployment import Deployment, open_deployment
from service.inference import InferenceRunner
from service.settings import Settings
from service.store import open_store

pytestmark = pytest.mark.browser
expect.set_options(timeout=30_000)  # a busy machine may take its time

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]
PHONE: ViewportSize = {"width": 360, "height": 740}


class Site:
    """A running service: its address, and the runner that saw its searches where that is a fake."""

    def __init__(self, address: str, runner: InferenceRunner) -> None:
        self.address = address
        self._runner = runner

    @property
    def runner(self) -> FakeRunner:
        assert isinstance(self._runner, FakeRunner)
        return self._runner


@contextmanager
def served(settings: Settings, deployment: Deployment) -> Iterator[Site]:
    """A service in a thread of its own."""
    app = create_app(settings, deployment, open_store(settings))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield Site(f"http://127.0.0.1:{listener.getsockname()[1]}", deployment.engines[0].runner)
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with served(fake_settings(folder), fake_deployment(fake_engine(folder))) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on PATH")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        yield launched
        launched.close()


@contextmanager
def opened(browser: Browser, site: Site) -> Iterator[Page]:
    """A fresh page of a fresh visitor; fails if it logs an error or asks any other host."""
    context = browser.new_context(base_url=site.address, locale="en-GB")
    page = context.new_page()
    page.set_default_timeout(30_000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console", lambda m: faults.append(m.text) if m.type == "error" and "status of 4" not in m.text else None
    )
    page.on("request", lambda r: faults.append(r.url) if urlsplit(r.url).netloc not in site.address else None)
    page.goto("/")
    expect(page.locator("#examples button").first).to_be_visible()
    yield page
    context.close()
    assert faults == []


@pytest.fixture
def page(site: Site, browser: Browser) -> Iterator[Page]:
    with opened(browser, site) as fresh:
        yield fresh


def test_a_search_by_keyboard_alone_finds_and_chooses_items(site: Site, page: Page) -> None:
    page.get_by_role("link", name="onesearch").focus()
    page.keyboard.press("/")
    page.keyboard.type("running shoes")
    page.keyboard.press("Enter")
    results = page.get_by_role("list", name="Results").get_by_role("listitem")
    expect(results).to_have_count(3)
    expect(results.first).to_contain_text("Trail running shoes")
    expect(results.first).to_contain_text("Fleet")
    expect(results.first).to_contain_text("79.00")
    expect(results.first).to_contain_text("sport › shoes")
    expect(page.get_by_role("status")).to_have_text(re.compile(r"3 results in \d+ ms"))
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(results.nth(1).get_by_role("button")).to_be_focused()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("searchbox")).to_be_focused()
    assert site.runner.seen[-1][0].query == "running shoes"


def test_sids_variant_and_timings_come_on_demand(page: Page) -> None:
    page.get_by_role("button", name="wool socks").click()
    results = page.get_by_role("list", name="Results").get_by_role("listitem")
    expect(results.first).to_contain_text("Wool socks")
    expect(page.get_by_text("SID 2·0·2·1·0")).to_be_hidden()
    page.get_by_text("How this answer was made").click()
    expect(page.get_by_text("SID 2·0·2·1·0")).to_be_visible()
    expect(page.locator("#facts")).to_contain_text(re.compile("Variant(control|keywords)"))
    expect(page.locator("#stages")).to_contain_text("decode")


def test_titles_are_text_and_never_markup(page: Page) -> None:
    page.get_by_role("searchbox").fill("boots")
    page.keyboard.press("Enter")
    expect(page.get_by_text("Leather <b>boots</b>")).to_be_visible()
    assert page.locator("#results b").count() == 0


def test_filters_and_variant_reach_the_service(site: Site, page: Page) -> None:
    page.get_by_role("searchbox").fill("socks shoes")
    page.keyboard.press("Enter")
    results = page.get_by_role("list", name="Results").get_by_role("listitem")
    expect(results).to_have_count(4)
    page.get_by_label("Category").select_option("socks")
    expect(results).to_have_count(2)
    page.get_by_label("In stock only").check()
    expect(results).to_have_count(1)
    page.get_by_label("Highest price").fill("5")
    page.keyboard.press("Tab")
    expect(page.get_by_role("status")).to_contain_text("Nothing found")
    page.get_by_label("Variant").select_option("keywords")
    expect(page.locator("#facts")).to_contain_text("Variantkeywords")
    assert "category=socks" in page.url
    page.reload()
    expect(page.get_by_label("Category")).to_have_value("socks")
    expect(page.get_by_role("searchbox")).to_have_value("socks shoes")


def test_a_click_is_sent_and_enters_the_history_of_the_user(site: Site, page: Page) -> None:
    page.get_by_label("Personalise for user").fill("ann")
    page.get_by_role("searchbox").fill("road shoes")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("this user is new")
    with page.expect_response("**/v1/events") as sent:
        page.get_by_role("button", name="Road running shoes").click()
    assert sent.value.status == 202
    assert sent.value.request.post_data_json["item_id"] == FIRST_ID + 1
    expect(page.get_by_role("status")).to_contain_text("remembered for ann")
    page.get_by_role("searchbox").fill("socks")
    page.keyboard.press("Enter")
    expect(page.get_by_role("listitem").first).to_contain_text("socks")
    assert site.runner.seen[-1][0].recent_items == (FIRST_ID + 1,)
    assert site.runner.seen[-1][0].recent_queries == ("road shoes",)


def test_a_refused_search_and_a_broken_service_are_said_plainly(page: Page) -> None:
    page.get_by_role("searchbox").fill("x" * 257)
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("query: String should have at most 256 characters")
    page.route("**/v1/search", lambda route: route.fulfill(status=404, json={"status": 500, "instance": "r-9"}))
    page.get_by_role("searchbox").fill("shoes")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("request r-9")
    page.unroute("**/v1/search")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("2 results")


def test_a_phone_shows_everything_without_sideways_scrolling(page: Page) -> None:
    page.set_viewport_size(PHONE)
    page.goto("/?q=leather+running+socks+shoes")
    expect(page.get_by_role("listitem")).to_have_count(5)
    page.get_by_text("How this answer was made").click()
    page.get_by_text("Filters", exact=True).click()
    expect(page.get_by_label("Category")).to_be_visible()
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= PHONE["width"]


def test_the_api_page_is_drawn_from_the_openapi_document(page: Page) -> None:
    page.goto("/docs")
    page.get_by_text("POST/v1/search").click()
    entry = page.locator("details[open]")
    expect(entry).to_contain_text("filters.price_max")
    expect(entry).to_contain_text("running shoes")


def results(page: Page) -> Locator:
    return page.get_by_role("list", name="Results").get_by_role("listitem")


def test_a_facet_sets_its_filter_and_takes_it_away_again(site: Site, page: Page) -> None:
    page.goto("/?q=running+socks+shoes")
    expect(results(page)).to_have_count(4)
    expect(page.locator("#counted")).to_have_text("Counts are of the 4 candidates of this search.")
    socks = page.get_by_role("group", name="Categories").get_by_role("button", name="socks 2")
    expect(socks).to_have_attribute("aria-pressed", "false")
    socks.focus()
    page.keyboard.press("Enter")
    expect(results(page)).to_have_count(2)
    expect(page.get_by_label("Category")).to_have_value("socks")
    chosen = page.get_by_role("button", name="socks 2")
    expect(chosen).to_have_attribute("aria-pressed", "true")
    expect(chosen).to_be_focused()
    page.keyboard.press("Enter")
    expect(results(page)).to_have_count(4)
    page.get_by_role("group", name="Brands").get_by_role("button", name="Fleet 2").click()
    expect(results(page)).to_have_count(2)
    page.get_by_role("group", name="Prices").get_by_role("button", name="79 1").click()
    expect(results(page)).to_have_count(1)
    expect(page.get_by_label("Lowest price")).to_have_value("79")
    assert site.runner.seen[-1][1].filters == Filters(brand="Fleet", price_min=79.0, price_max=79.0)
    page.get_by_label("Published after").fill("2024-05-01")
    expect(page.get_by_role("status")).to_contain_text("Nothing found")
    page.go_back()
    expect(results(page)).to_have_count(1)


def test_a_browser_keeps_its_user_until_it_is_changed(site: Site, page: Page) -> None:
    field = page.get_by_label("Personalise for user")
    expect(field).to_have_value(re.compile(r"^guest-\w+$"))
    given = field.input_value()
    page.goto("/?q=boots")
    expect(field).to_have_value(given)
    expect(results(page)).to_have_count(1)
    assert given not in page.url
    page.get_by_role("button", name="New user").click()
    expect(field).not_to_have_value(given)
    page.route("**/v1/users/*", lambda route: route.fulfill(status=404, json={"detail": "the store is away"}))
    page.get_by_role("button", name="Forget history").click()
    expect(page.get_by_role("status")).to_have_text("The history was not forgotten: the store is away")
    field.fill("")
    page.keyboard.press("Tab")
    page.reload()
    expect(field).to_have_value("")
    with page.expect_response("**/v1/search") as sent:
        page.get_by_role("button", name="Search").click()
    assert "user_id" not in sent.value.request.post_data_json


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, exported: tuple[Path, object, object]) -> Iterator[Site]:
    """A service over a whole bundle, with a real model, small as it is."""
    folder, (bundle, *_) = tmp_path_factory.mktemp("shop"), exported
    settings = fake_settings(folder)
    with served(settings, open_deployment([bundle], settings)) as running:
        yield running


def test_a_shopper_searches_narrows_down_compares_variants_and_changes_the_ranking(
    shop: Site, browser: Browser
) -> None:
    with opened(browser, shop) as page:
        page.get_by_label("Variant").select_option("control")
        page.get_by_role("searchbox").fill("red shoes")
        with page.expect_request("**/v1/events") as seen:
            page.keyboard.press("Enter")
        expect(results(page)).to_have_count(20)
        expect(page.get_by_role("status")).to_contain_text("variant control · this user is new")
        page.get_by_text("How this answer was made").click()
        facts = page.locator("#facts")
        expect(facts).to_contain_text("History used0 queries, 0 clicks, 0 orders")
        expect(facts).to_contain_text("Beam width512, scores by level")
        impressions = seen.value.post_data_json["events"]
        titles = results(page).locator(".title").all_inner_texts()
        user = page.get_by_label("Personalise for user").input_value()
        assert {(e["type"], e["user_id"], e["variant"]) for e in impressions} == {("impression", user, "control")}
        assert impressions[0]["request_id"] in page.locator("#facts dd").last.inner_text()

        with page.expect_response("**/v1/events") as sent:
            results(page).nth(7).get_by_role("button").click()
        click = sent.value.request.post_data_json
        assert sent.value.status == 202
        assert (click["type"], click["request_id"]) == ("click", impressions[0]["request_id"])
        page.get_by_role("button", name="See what changes").click()
        expect(facts).to_contain_text("History used0 queries, 1 clicks, 0 orders")
        expect(page.get_by_role("status")).to_contain_text(re.compile("since your last search: .*up"))
        after = results(page).locator(".title").all_inner_texts()
        for place, row in enumerate(results(page).all()):
            was = titles.index(after[place]) if after[place] in titles else None
            if was == place:
                expect(row.locator(".moved")).to_be_hidden()
            else:
                moved = "new" if was is None else f"{'▲' if was > place else '▼'} {abs(was - place)}"
                expect(row.locator(".moved")).to_have_text(moved)

        page.get_by_role("group", name="Brands").get_by_role("button", name="acme").click()
        expect(results(page)).to_have_count(15)
        page.get_by_label("Variant").select_option("keywords")
        expect(page.get_by_role("status")).to_contain_text("variant keywords")
        expect(facts).to_contain_text("Keywordsshoes (from the dictionary)")
        page.get_by_role("button", name="Forget history").click()
        expect(facts).to_contain_text("History used0 queries, 0 clicks, 0 orders")
