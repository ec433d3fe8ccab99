"""The report: it shows what the artifacts hold, in one file, finished or not; no text of the corpus becomes markup."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pyarrow.parquet as pq
import pytest
from report_pages import Page, rows
from synthetic_run import EVIL, REFERENCE, build, influences, make_recipe, metrics

from mates.engine.config import Recipe
from mates.engine.data.index import read_index
from mates.engine.evaluate.contents import Fit
from mates.engine.evaluate.figures import RASTER_POINTS, agreement_figure, flops_unit, signed, smoothed
from mates.engine.evaluate.report import show_flops, show_percent, show_seconds, write_report
from mates.engine.influence.fit import PREDICTIONS_FILE
from mates.engine.layout import layout_of
from mates.engine.ledger import collect
from mates.preprocess import artifact


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = make_recipe(tmp_path_factory.mktemp("report"))
    build(recipe)
    return recipe


@pytest.fixture(scope="module")
def html(complete: Recipe) -> str:
    return write_report(complete).read_text(encoding="utf-8")


@pytest.fixture
def recipe(complete: Recipe, tmp_path: Path) -> Recipe:
    """A copy of the complete run that a test may change."""
    shutil.copytree(complete.run_dir, tmp_path / "run")
    return replace(complete, run_dir=str(tmp_path / "run"))


def test_the_headline_equals_the_artifacts(complete: Recipe, html: str) -> None:
    table = rows(html)
    random, mates = metrics(complete, "random", 2), metrics(complete, "mates", 2)
    name = f"{REFERENCE}.loss_nats"
    assert table[f"Held-out {REFERENCE} loss nats per label token"] == [f"{m[name]:.4f}" for m in (random, mates)]
    assert table[f"Held-out {REFERENCE} accuracy"] == ["18.75% of 16", "18.75% of 16"]
    losses = [f"{m['holdout_loss_nats']:.4f}" for m in (random, mates)]
    assert table["Held-out text loss nats per token"] == losses
    assert table["Compute, selection included"] == ["3.00 TFLOP", "3.06 TFLOP"]
    assert table["Selection over pretraining FLOPs"] == ["0.0%", "2%"]
    assert table["Time, selection included"] == ["5 min 00 s", "5 min 32 s"]
    assert f"at 1.020 × its compute: {REFERENCE} loss −0.250 nats" in Page(html).words


def test_costs_are_listed_by_step_and_method(html: str) -> None:
    table = rows(html)
    assert table["probe"] == ["–", "40.0 GFLOP 20.0 s"]
    assert table["fit"] == ["–", "6.00 GFLOP 8.0 s"]
    assert table["pretrain"] == ["3.00 TFLOP 5 min 00 s"] * 2
    assert table["evaluate"] == ["1.50 TFLOP 2 min 30 s"] * 2
    assert table["pretrain shared stage 0"][:3] == ["1.00 TFLOP", "1 min 40 s", "3,200"]


def test_stages_show_influences_agreement_scores_and_examples(complete: Recipe, html: str) -> None:
    layout, words = layout_of(complete), Page(html).words
    for stage in (1, 2):
        nats = influences(complete, stage)
        assert f"change of the loss on {REFERENCE}." in words
        assert f"Mean {signed(nats.mean())} nats, SD {nats.std():.3g} nats" in words
        for value in [*np.sort(nats)[:5], *np.sort(nats)[-5:]]:
            assert f"{signed(value)} nats ({signed((value - nats.mean()) / nats.std())} SD)" in words
        info = artifact.load(layout.influence_model("mates", stage)).info["agreement"]["test"]
        assert f"Spearman {signed(info['spearman'])} , Pearson {signed(info['pearson'])} ." in words
        table = pq.read_table(layout.influence_model("mates", stage) / PREDICTIONS_FILE)
        assert f"{table['part'].to_pylist().count('test')} test samples" in words
        index = read_index(layout.index("mates", stage), artifact.load(layout.corpus("train")).fingerprint)
        info = index.manifest.info
        chosen, offered = signed(info["mean_score_selected"]), signed(info["mean_score_candidates"])
        assert f"100 of 200 candidates selected. Mean score {chosen} SD of the selected, {offered} SD" in words


def test_stages_show_how_faithful_the_labels_are(html: str) -> None:
    table, words = rows(html), Page(html).words
    assert table["linear (taken)"] == [REFERENCE, "0.940 (0.850 to 0.950)", "0.950 (0.860 to 0.960)"]
    assert table["sgd"] == [REFERENCE, "not defined", "not defined"]
    assert (
        f"On 32 samples, with 95% bootstrap intervals. Labels were taken by linear. The exact influences' own reliability, from two "
        f"halves of the reference: {REFERENCE} 0.940 (0.850 to 0.950) ." in words
    )
    for stage in (1, 2):
        assert f"an n-gram model has Spearman {signed(0.25)} ({10 * stage}), undefined ({20 * stage}): a rise" in words
    worth = (
        "The best 50% of the test labels by prediction have a mean influence of -0.75 SD, those sampled at temperature 0.5 -0.50, where "
        "chance has +0.00 and the oracle -1.25."
    )
    drift = " Its predictions agree with those of the model before by a Spearman of 0.875."
    assert words.count(worth) == 2
    assert words.count(worth + drift) == 1


def test_text_of_the_corpus_never_becomes_markup(html: str) -> None:
    assert EVIL not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "https://example.org/page?a=1&amp;b=2" in html
    assert Page(html).tags["script"] == 0


def test_the_file_needs_nothing_else(html: str) -> None:
    page = Page(html)
    assert page.open == []
    assert not page.tags.keys() & {"script", "link", "iframe", "object", "embed", "base"}
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
    assert not re.search(r"@import|url\((?!#)", html)


def test_a_complete_report_has_no_gaps(html: str) -> None:
    page = Page(html)
    assert not re.search(r"\b(nan|NaN|None|inf|Infinity|null)\b", page.words)
    assert "not done yet" not in html
    assert "not complete" not in page.words
    assert page.tags["svg"] == 2 + 3 + 2 * 3  # losses, evaluations, two chosen stages


def test_ids_are_unique_and_references_lead_to_them(html: str) -> None:
    ids = Counter(value for _, name, value in Page(html).attributes if name == "id")
    assert [name for name, count in ids.items() if count > 1] == []
    used = set(re.findall(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"', html))
    assert used
    assert {first or second for first, second in used} <= ids.keys()


def test_figures_take_the_pages_colours(html: str) -> None:
    assert "currentColor" in html
    assert "prefers-color-scheme: dark" in html
    for figure in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        assert set(re.findall(r"(?:fill|stroke): (#\w+)", figure)) == set()


def test_many_points_become_a_picture_inside_the_figure() -> None:
    normal = np.random.default_rng(0).normal(size=(2, RASTER_POINTS + 1))
    correlations = {"spearman": 0.0, "pearson": 0.0}
    fit = Fit(
        oracle_sd=normal[0], predicted_sd=normal[1], label_mean_nats=0.0, label_sd_nats=1.0, label_curve=[], findings=[], **correlations
    )
    figure = agreement_figure("many", fit, 1)
    assert len(figure) < 200_000
    pictures = [value for tag, name, value in Page(figure).attributes if (tag, name) == ("image", "xlink:href")]
    assert len(pictures) == 1
    assert pictures[0].startswith("data:image/png;base64,")


def test_the_same_run_gives_the_same_bytes_and_leaves_matplotlib_alone(complete: Recipe, html: str) -> None:
    before = dict(mpl.rcParams)
    assert write_report(complete).read_text(encoding="utf-8") == html
    assert dict(mpl.rcParams) == before


def test_undefined_agreement_is_said_in_words(recipe: Recipe) -> None:
    directory = layout_of(recipe).influence_model("mates", 2)
    made = artifact.load(directory)
    info = dict(made.info) | {"agreement": made.info["agreement"] | {"test": {"spearman": None, "pearson": None}}}
    artifact.commit(directory, kind=made.kind, settings=made.settings, inputs=made.inputs, info=info, cost=made.cost, files=made.files)
    words = Page(write_report(recipe).read_text(encoding="utf-8")).words
    assert "Spearman not defined (too few samples, or all alike), Pearson not defined" in words
    assert "None" not in words


def test_a_report_of_nothing(complete: Recipe, tmp_path: Path) -> None:
    path = write_report(replace(complete, run_dir=str(tmp_path / "nothing")))
    page = Page(path.read_text(encoding="utf-8"))
    assert "This run is not complete: 24 of 24 steps" in page.words
    assert page.tags["svg"] == 0
    assert rows(path.read_text(encoding="utf-8"))["Compute, selection included"] == ["not done yet"] * 2


@pytest.mark.parametrize(
    ("gone", "figures"),
    [
        (["evaluation"], 2 + 3 + 6),  # the points of the other stages are still drawn
        (["evaluation", "checkpoint", "index"], 2 + 3 + 5),
        (["evaluation", "checkpoint", "index", "scores", "influence-model", "labels"], 2 + 3 + 3),
    ],
)
def test_an_interrupted_run_names_what_is_missing(recipe: Recipe, gone: list[str], figures: int) -> None:
    for name in gone:
        shutil.rmtree(layout_of(recipe).stage("mates", 2) / name)
    left = [entry.cost for entry in collect(recipe).path("mates") if entry.cost is not None]
    done = sum(cost.flops for cost in left)
    html = write_report(recipe).read_text(encoding="utf-8")
    page = Page(html)
    assert f"This run is not complete: {len(gone)} of 24 steps" in page.words
    assert page.tags["svg"] == figures
    losses = rows(html)["Held-out text loss nats per token"]
    assert losses == [f"{metrics(recipe, 'random', 2)['holdout_loss_nats']:.4f}", "not done yet"]
    assert "against random, at" not in page.words
    assert f"{show_flops(done)} so far" in page.words
    assert not re.search(r"\b(nan|None|inf)\b", page.words)


@pytest.mark.parametrize("changes", [{"methods": ["random"]}, {"methods": ["mates"]}])
def test_other_sets_of_methods(complete: Recipe, changes: dict[str, list[str]]) -> None:
    recipe = replace(complete, **changes)  # type: ignore[arg-type]
    page = Page(write_report(recipe).read_text(encoding="utf-8"))
    assert "not complete" not in page.words
    assert "against random, at" not in page.words
    assert ("No stage of this recipe is chosen" in page.words) == (changes["methods"] == ["random"])


def test_a_single_stage_has_nothing_to_compare(complete: Recipe) -> None:
    recipe = replace(complete, pretrain=replace(complete.pretrain, stages=1))
    page = Page(write_report(recipe).read_text(encoding="utf-8"))
    assert "not complete" not in page.words
    assert "against random, at" not in page.words
    assert page.tags["svg"] == 1 + 3


@pytest.mark.parametrize(
    ("flops", "shown"),
    [
        (0, "0"),
        (512, "512 FLOP"),
        (4.117128e11, "412 GFLOP"),
        (9.999e11, "1.00 TFLOP"),
        (1.5e18, "1.50 EFLOP"),
    ],
)
def test_flops_are_shown_with_three_digits(flops: float, shown: str) -> None:
    assert show_flops(flops) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0042, "0.004 s"),
        (12.34, "12.3 s"),
        (59.99, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_seconds_are_shown_as_people_say_them(seconds: float, shown: str) -> None:
    assert show_seconds(seconds) == shown


def test_small_shares_keep_two_digits() -> None:
    assert [show_percent(share) for share in (0, 0.216, 0.0234, 0.00012)] == ["0.0%", "21.6%", "2.3%", "0.012%"]


def test_units_and_smoothing() -> None:
    assert flops_unit(9e11) == (1e9, "GFLOP")
    assert smoothed(np.array([1.0, 2.0, 6.0, 3.0]), 3).tolist() == [1.5, 3.0, 11 / 3, 4.5]
    assert smoothed(np.array([1.0, 2.0]), 1).tolist() == [1.0, 2.0]
