"""Draws the README's pictures from bench_reasons.json, as SVG beside this file.

    python tests/bench/figures.py           ppo.svg: reward, KL and truth over the updates of PPO
                                            curve.svg: NDCG@10 over the truth of the reasons

Equal figures give equal files, byte for byte.
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).resolve()
CHANCE = 0.4  # of the truth: two of an item's five aspects
NO_REASON = 0.32  # where the arms without reasons stand on the axis of the truth
COLOURS = {"with IDs": "#1f6fb4", "without IDs": "#d2691e"}
GREY = "#555555"
LOOK = {
    "svg.hashsalt": "curec",  # ids within the file: else drawn at random
    "svg.fonttype": "none",  # text stays text: a small file
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",  # also on a dark page
    "legend.frameon": False,
}


def draw_ppo(course: dict):
    """Reward, KL and truth of an update's answers, one panel each."""
    panels = {
        "reward": "reward less that of\nthe aligned LLM (nats)",
        "kl": "KL to the aligned LLM\n(nats an answer)",
        "truth_precision": "share of named phrases\nthat are true",
    }
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    updates = range(1, len(course["reward"]) + 1)
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        axis.plot(updates, course[name], color=COLOURS["with IDs"], linewidth=1.5)
        axis.set_xlabel("PPO update")
        axis.set_title(label, fontsize=10)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes[0].axhline(0, color=GREY, linewidth=0.8, linestyle="--")
    axes[2].axhline(CHANCE, color=GREY, linewidth=0.8, linestyle="--")
    axes[2].text(updates[-1], CHANCE, "chance", color=GREY, ha="right", va="bottom")
    return figure


def draw_curve(curve: dict, best: float):
    """NDCG@10 over truth in both families of arms; bands and bars are t-intervals over worlds.
    best: the best possible ranking's."""
    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    truths = list(curve["truth"])
    x = [curve["truth"][q]["mean"] for q in truths]
    for family, colour in COLOURS.items():
        values = [curve[family]["ndcg@10"][q] for q in truths]
        low, high = zip(*map(interval, values), strict=True)
        axis.plot(x, [value["mean"] for value in values], color=colour, label=family)
        axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        point(axis, NO_REASON, curve[family]["content"], colour)
        for kind in curve["kinds"].values():
            point(axis, kind["truth"]["mean"], kind[family], colour)
    axis.axhline(best, color=GREY, linestyle="--", linewidth=1)
    axis.text(1, best, "best possible ranking", color=GREY, ha="right", va="bottom")
    axis.set_ylim(0)
    in_order = sorted(curve["kinds"], key=lambda kind: curve["kinds"][kind]["truth"]["mean"])
    for place, kind in enumerate(in_order):
        truth = curve["kinds"][kind]["truth"]["mean"]
        axis.axvline(truth, color=GREY, linewidth=0.6, linestyle=":")
        # neighbours on different sides of their lines
        side = ("right", "left")[place % 2]
        axis.text(truth, 0.004, f" {kind} ", color=GREY, ha=side, va="bottom")
    ticks = [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    axis.set_xticks([NO_REASON, *ticks], ["no\nreason", *map(str, ticks)])
    axis.set_xlabel("truth of the reasons: share of named phrases that are drivers")
    axis.set_ylabel("NDCG@10 on test")
    axis.legend(loc="upper left", bbox_to_anchor=(0.05, 0.55))
    return figure


def interval(value: dict) -> list:
    """The t-interval over worlds; of one world the value alone."""
    return value.get("t95", [value["mean"]] * 2)


def point(axis, x: float, value: dict, colour: str) -> None:
    """A measured point with its interval."""
    low, high = interval(value)
    bar = [[value["mean"] - low], [high - value["mean"]]]
    style = {"fmt": "o", "color": colour, "markersize": 5, "linewidth": 1}
    axis.errorbar([x], [value["mean"]], bar, capsize=2, **style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    results = HERE.with_name("bench_reasons.json")
    parser.add_argument("--json", type=pathlib.Path, default=results, help="the figures")
    parser.add_argument("--out", type=pathlib.Path, default=HERE.parent, help="a folder")
    args = parser.parse_args()
    plt.rcParams.update(LOOK)
    known = json.loads(args.json.read_text())
    found = {part: entry["results"] for part, entry in known.items()}
    pictures = {}
    if "worlds" in found:
        pictures["ppo"] = draw_ppo(found["worlds"]["ppo course"])
    if {"curve", "limit"} <= set(found):
        best = found["limit"]["limit"]["ndcg@10"]["mean"]
        pictures["curve"] = draw_curve(found["curve"], best)
    for name, picture in pictures.items():
        path = args.out / f"{name}.svg"
        picture.savefig(path, metadata={"Date": None})
        print(path)


if __name__ == "__main__":
    main()
