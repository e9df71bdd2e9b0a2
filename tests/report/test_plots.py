"""Figures from tiny synthetic tables: axes, lines, error bars. No image is compared with another."""

import itertools
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.container import BarContainer, ErrorbarContainer

from afdslib.base import paths
from afdslib.base.errors import AFDSError
from afdslib.data import ArrayImages
from afdslib.report import plots

METHODS = ("l2", "afd")
BUDGETS = (1.0, 0.5, 0.1)


@pytest.fixture
def sweep():
    table = pd.DataFrame(itertools.product(METHODS, (0, 1), BUDGETS), columns=["method", "seed", "budget"])
    b = table.budget
    table = table.assign(target="toy", macs=0.98 * b, test_accuracy=0.5 + 0.3 * b + 0.02 * table.seed, static=10)
    table["test_mean_class_accuracy"], table["density"] = 0.5 + 0.2 * b, (b**0.5).clip(lower=0.5)
    return table.assign(parameters=(1e5 * b).astype(int), removed=(100 * (1 - b)).astype(int), dynamic=100 * b)


def layers(removed=2):
    layer = {"channels": 8, "removed": removed, "static": 3, "dynamic": 5 - removed}
    quantiles = {"gate_quantiles": np.linspace(0, 2, 11).tolist(), "active_quantiles": np.linspace(0, 1, 11).tolist()}
    return {f"layer{i}": layer | quantiles for i in range(3)}


def history(seed=0, **columns):
    table = {"step": [10, 20], "cross_entropy": [1.0 + seed, 0.5], "train_accuracy": [0.5, 0.9 - 0.1 * seed]}
    return pd.DataFrame(table | columns)


def dataset(augment=False):
    images = np.random.RandomState(0).randint(0, 255, (6, 16, 16, 3), dtype=np.uint8)
    return ArrayImages(images, np.arange(6), np.array([0, 0, 0, 1, 1, 1]), ("cat", "dog"), augment=augment)


def attended(weights):
    image, maps = np.zeros((16, 16, 3), np.uint8), np.ones((5, 4, 4))
    return SimpleNamespace(image=image, caption="cat", layer="layer3.0", weights=weights, maps=maps)


def test_accuracy_has_one_line_with_error_bars_per_method_on_a_log_axis(sweep):
    fig = plots.accuracy_macs(sweep, chance={"toy": 0.2})
    panels = [ax for ax in fig.get_axes() if ax.containers]
    assert len(panels) == 2 and [text.get_text() for text in fig.legends[0].get_texts()] == ["L2", "AFD"]
    for ax in panels:
        bars = [c for c in ax.containers if isinstance(c, ErrorbarContainer)]
        assert len(bars) == 2 and all(bar.has_yerr for bar in bars) and ax.get_xscale() == "log"
        colours = [to_hex(line.get_color()).upper() for line in ax.lines if len(line.get_xdata()) == len(BUDGETS)]
        assert list(dict.fromkeys(colours)) == [plots.look(method).colour for method in METHODS]
        assert "MACs" in ax.get_xlabel() and "%" in ax.get_xlabel() and "%" in ax.get_ylabel()
    top = [child for child in panels[0].child_axes]
    fig.draw_without_rendering()
    assert {label.get_text() for label in top[0].get_xticklabels()} >= {"1x", "2x", "10x"}


def test_error_bars_are_the_standard_deviation_over_seeds(sweep):
    figure = plots.accuracy_macs(sweep)
    ax = next(ax for ax in figure.get_axes() if ax.containers)
    low, high = ax.containers[0].lines[2][0].get_segments()[0][:, 1]
    rows = sweep[(sweep.method == "l2") & (sweep.budget == 0.1)]
    assert (high - low) / 2 == pytest.approx(rows.test_accuracy.std(ddof=1))
    assert ax.lines[0].get_ydata()[0] == pytest.approx(rows.test_accuracy.mean())
    assert "2 seeds" in figure.legends[0].get_title().get_text()
    one = plots.accuracy_macs(sweep[sweep.seed == 0])
    assert "no error bars" in one.legends[0].get_title().get_text()
    for fig, word in ((plots.parameters_budget(sweep), "thousands"), (plots.density_and_masks(sweep), "%")):
        ax = fig.get_axes()[0]
        assert ax.get_xscale() == "log" and word in ax.get_ylabel() and "MACs" in ax.get_xlabel()
        assert len([c for c in ax.containers if isinstance(c, ErrorbarContainer)]) == len(METHODS)


def test_each_target_has_its_own_row(sweep):
    both = pd.concat([sweep, sweep.assign(target="other")])
    panels = [ax for ax in plots.accuracy_macs(both, chance={"toy": 0.1, "other": 0.5}).get_axes() if ax.containers]
    assert [ax.get_title(loc="left") for ax in panels] == ["toy", "", "other", ""]
    chance = [next(line for line in ax.lines if len(set(line.get_ydata())) == 1).get_ydata()[0] for ax in panels]
    assert chance == [0.1, 0.1, 0.5, 0.5]


def test_a_figure_of_one_target_says_which(sweep):
    view = attended(np.full(5, 0.2))
    curve = history(entropy=[1.0, 0.5])
    for fig in (
        plots.density_and_masks(sweep, title="toy"), plots.parameters_budget(sweep, title="toy"),
        plots.attention(view, title="toy"), plots.attention_entropy({"joint": [curve]}, {"a": (4, 2, 2)}, title="toy"),
        plots.gates_heatmap({"10x": layers()}, title="toy"), plots.channel_states({1.0: layers()}, title="toy")
    ):  # fmt: skip
        parts = [fig, *getattr(fig, "subfigs", [])]
        titles = [part.get_suptitle() for part in parts] + [ax.get_title(loc="left") for ax in fig.get_axes()]
        assert any("toy" in title for title in titles)


def test_targets_have_files_of_their_own_and_are_shown_below_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("AFDS_FIGURES", str(tmp_path))
    figures = {"cifar10-60": plots.sentence("nothing to draw"), "a/b": plots.sentence("nothing either")}
    gallery = plots.save(figures, "toy", "trials")
    names = [picture.path.name for picture in gallery.pictures]
    assert names == ["trials-cifar10-60.png", "trials-a-b.png"] and all(p.path.is_file() for p in gallery.pictures)
    assert gallery._repr_html_().count("data:image/png;base64,") == 2 and "figure trials-a-b" in repr(gallery)
    assert repr(plots.stored("toy", "trials", figures)) == repr(gallery)
    assert repr(plots.stored("toy", "trials", ["a/b", "missing"])) == "figure trials-a-b"
    assert "not drawn yet" in plots.stored("toy", "trials")
    assert plots.sentence("nothing to draw").get_axes()[0].texts[0].get_text() == "nothing to draw"


def test_looks_differ_in_colour_and_marker_and_in_grey_and_an_unknown_one_is_one_sentence(sweep):
    main = [plots.look(name) for name in ("l2", "l2sp", "feature-map", "afd")]
    assert len({style.colour for style in main}) == len({style.marker for style in main}) == len(main)
    assert len({style.dashes for style in main}) == len(main)
    everything = [(style.colour, style.marker) for style in plots.METHODS.values()]
    assert len(set(everything)) == len(everything)
    grey = sorted(np.dot(to_rgb(style.colour), (0.299, 0.587, 0.114)) for style in main)
    assert grey[1] - grey[0] > 0.2  # L2 is black; markers and lines tell the others apart
    with pytest.raises(AFDSError, match="no colour and marker for method 'dropout'"):
        plots.accuracy_macs(sweep.assign(method="dropout"))


def test_learning_curves_have_bands_over_seeds_and_units():
    fig = plots.learning_curves({"l2": [history(0), history(1)], "afd": [history(0), history(1)]}, title="x")
    left, right = fig.get_axes()
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["L2", "AFD"] and len(left.collections) == 2
    assert list(left.lines[0].get_ydata()) == [1.5, 0.5]
    assert "nats" in left.get_ylabel() and "training" in right.get_ylabel() and left.get_xlabel() == "optimiser step"
    validated = plots.learning_curves({"source": [history(validation_accuracy=[0.1, 0.2])]})
    assert "validation" in validated.get_axes()[1].get_ylabel()
    assert not validated.get_axes()[0].collections  # one seed has no band
    validated = plots.learning_curves({"source": [history(validation_accuracy=[0.07, 0.25])]})
    validated.draw_without_rendering()
    axis = validated.get_axes()[1].yaxis
    for place, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True):
        assert float(label.get_text()) == pytest.approx(100 * place)  # not rounded to the wrong number
    empty = plots.learning_curves({"source": [pd.DataFrame()]})
    assert "no curve" in empty.get_axes()[0].texts[0].get_text()


def test_trials_ring_the_chosen_strength():
    rows = [("l2", 1e-3, 0.5), ("l2", 1e-2, 0.6), ("afd", 0.1, 0.7)]
    table = pd.DataFrame(rows, columns=["method", "strength", "validation_accuracy"])
    ax = plots.trials(table, {"l2": 1e-2, "afd": 0.1}).get_axes()[0]
    rings = ax.collections[-1].get_offsets()[:, 0]
    assert ax.get_xscale() == "log" and list(rings) == pytest.approx([1e-2, 0.1], rel=0.1)
    assert "strength" in ax.get_xlabel() and "validation" in ax.get_ylabel()


def test_gates_heatmap_has_a_row_per_layer_and_one_scale():
    fig = plots.gates_heatmap({"before": layers(), "after": layers()})
    left, right, bar = fig.get_axes()
    assert left.collections[0].get_array().shape == (3, 11)
    assert left.collections[0].get_clim() == right.collections[0].get_clim()
    assert [label.get_text() for label in left.get_yticklabels()] == list(layers()) and bar.get_ylabel()
    shares = plots.gates_heatmap({"10x": layers()}, quantity="active_quantiles")
    assert shares.get_axes()[0].collections[0].get_clim() == (0, 100)


def test_bars_of_channel_states_add_up_to_all_channels():
    fig = plots.channel_states({1.0: layers(), 0.1: layers(removed=4)})
    for ax in fig.get_axes():
        stacks = [c for c in ax.containers if isinstance(c, BarContainer)]
        assert len(stacks) == 3
        assert [sum(bar[i].get_height() for bar in stacks) for i in range(3)] == pytest.approx([1, 1, 1])
        assert ax.get_ylabel()
    assert fig.get_axes()[-1].get_xlabel()
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["dynamic", "static", "removed"]


def test_confusion_is_in_percent_of_the_true_class():
    ax, bar = plots.confusion([[3, 1], [0, 4]], ("cat", "dog")).get_axes()
    assert [text.get_text() for text in ax.texts] == ["75", "25", "0", "100"]
    assert ax.get_xlabel() == "predicted class" and ax.get_ylabel() == "true class" and "%" in bar.get_ylabel()
    assert not plots.confusion(np.eye(30), [str(i) for i in range(30)]).get_axes()[0].texts  # too many to print


def test_attention_shows_every_channel_and_the_top_ones_on_the_image():
    fig = plots.attention(attended(np.array([0.1, 0.4, 0.2, 0.0, 0.3])), top=2)
    axes = fig.get_axes()
    heights = [bar.get_height() for bar in axes[0].containers[0]]
    assert heights == pytest.approx([60, 20, -20, -60])  # against 1/4; the removed channel is left out
    assert "layer3.0" in axes[0].get_xlabel() and "%" in axes[0].get_ylabel()
    assert [ax.get_title(loc="center") for ax in axes[2:4]] == ["channel 1", "channel 4"]
    assert len(axes) == 1 + 2 + 2


def test_attention_entropy_is_a_share_of_uniform():
    fig = plots.attention_entropy({"joint": [history(entropy=[np.log(4), np.log(2)])]}, {"a": (4, 2, 2)})
    ax = fig.get_axes()[0]
    assert ax.lines[0].get_ydata() == pytest.approx([100, 50]) and "%" in ax.get_ylabel()


def test_samples_show_each_class_under_its_name_and_augmentations_leave_the_epoch_as_it_was():
    fig = plots.samples(dataset(), captions=("Felis catus, cat", "a very long class name"), per_class=2)
    titles = [ax.get_title(loc="center") for ax in fig.get_axes()]
    assert "Felis catus" in titles and any(title.endswith("…") for title in titles)
    assert sum(bool(ax.images) for ax in fig.get_axes()) == 4
    images = dataset(augment=True)
    images.set_epoch(3)
    fig = plots.augmentations(images, epochs=4)
    assert images.epoch == 3 and len(fig.get_axes()) == 5


def test_diagram_boxes_do_not_overlap_and_hold_their_text():
    fig = plots.diagram()
    fig.draw_without_rendering()
    for ax in fig.get_axes():
        boxes = [patch.get_window_extent() for patch in ax.patches if hasattr(patch, "get_boxstyle")]
        boxes = [box for box in boxes if box.width > 20]
        assert len(boxes) >= 8
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlaps(other)
        for text in ax.texts:
            inside = text.get_window_extent()
            touched = [box for box in boxes if box.overlaps(inside)]
            assert len(touched) <= 1, text.get_text()
            if touched and text.get_ha() == "center" and "\n" in text.get_text():
                assert touched[0].width >= inside.width, text.get_text()


def test_saved_figures_are_the_same_bytes_and_change_no_setting(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("AFDS_FIGURES", str(tmp_path))
    before = dict(matplotlib.rcParams)
    picture = plots.save(plots.accuracy_macs(sweep), "toy", "accuracy")
    first = picture.path.read_bytes()
    assert plots.save(plots.accuracy_macs(sweep), "toy", "accuracy").path.read_bytes() == first
    assert picture.path == paths.figures("toy") / "accuracy.png" and first.startswith(b"\x89PNG")
    small = picture.path.with_suffix(".phone.png").read_bytes()
    assert int.from_bytes(small[16:20]) <= 600 < int.from_bytes(first[16:20])  # 4 inches
    assert str(tmp_path) not in repr(picture) and picture._repr_png_()[0] == first
    assert dict(matplotlib.rcParams) == before
    assert repr(plots.stored("toy", "accuracy")) == repr(picture)
    assert "afds run --profile toy" in plots.stored("toy", "nothing")
