"""What a pretrained LLM's sentences are worth: reads finished runs and prints the tables of
RESULTS.md.

    python tests/bench/bench_sentences.py RUN [RUN ...]        figures, into bench_sentences.json
    python tests/bench/bench_sentences.py RUN --sheet          40 reasons to rate blind: sheet.json
    python tests/bench/bench_sentences.py RUN --rated A B      what two raters answered
    python tests/bench/bench_sentences.py RUN --gains          what PPO changed in the rewards

RUN is a run folder of a source with reviews. Figures: differences of NDCG@10 and HR@50 (paired over
users), confirmed (paired over reviews), the course of PPO, ten reasons of each kind drawn by seed.

Rating: ten items drawn by seed, with their reasons of three kinds and a placebo (another item's
corrected reason), mixed; sheet.json has the item's text, three train reviews and the reason, not
its kind. A rater answers with a list of {"number", "sensible", "specific", "invented"}, each true
or false.
"""

import argparse
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[2]))

import numpy as np
import torch

import curec
import data as D
import recommender as rec
import reward
import rl

PAIRS = [("curec", b) for b in ("content", "reviews", "placebo", "aligned", "rl", "bestof")]
PAIRS += [(a, b) for a in ("aligned", "rl", "bestof") for b in ("content", "reviews")]
KINDS = ("aligned", "rl", "curec", "placebo")
DRAWN = 10
QUESTIONS = ("sensible", "specific", "invented")


def run_ranks(folder, arm):
    """Test ranks of an arm, (seeds, users)."""
    paths = sorted(folder.glob(f"state/arm-{arm}.*.pt"))
    fits = [torch.load(path, weights_only=True)["value"] for path in paths]
    return np.stack([fit["ranks"] for fit in fits])


def differences(folder):
    """Rows: PAIRS of arms, by NDCG@10 and HR@50, with intervals over users."""
    rows = []
    for a, b in PAIRS:
        first, second = rec.metrics(run_ranks(folder, a)), rec.metrics(run_ranks(folder, b))
        for metric in ("ndcg@10", "hr@50"):
            found = rec.paired_bootstrap(first[metric], second[metric])
            rows.append({"a - b": f"{a} - {b}", "metric": metric} | found)
    return rows


def reason_lines(folder):
    return [json.loads(line) for line in (folder / "reasons.jsonl").read_text().splitlines()]


def drawn_reasons(lines, rng):
    """Ten items drawn by seed: their reasons of each kind, placebo: the next drawn item's."""
    having = [
        k for k, line in enumerate(lines) if line["aligned"] and line["rl"] and line["reason"]
    ]
    drawn = rng.permutation(having)[:DRAWN]
    rows = []
    for k, other in zip(drawn, np.roll(drawn, 1), strict=True):
        line = lines[k]
        said = {"aligned": line["aligned"], "rl": line["rl"], "curec": line["reason"]}
        rows.append({"line": int(k), "item": line["title"], **said})
        rows[-1]["placebo"] = lines[other]["reason"]
    return rows


def figures(folder):
    """All that RESULTS.md shows of a run."""
    metrics = json.loads((folder / "metrics.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    log = [json.loads(line) for line in (folder / "ppo.jsonl").read_text().splitlines()]
    course = "update reward kl grounded format_ok distinct length entropy".split()
    confirmed = [row for row in metrics["comparisons"] if row["metric"] == "confirmed"]
    return {
        "settings": config["settings"],
        "git_commit": config["git_commit"],
        "dataset": metrics["dataset"],
        "time_s": metrics["time_s"],
        "peak_memory_mb": metrics["peak_memory_mb"],
        "reward": metrics["reward"],
        "ppo": metrics["ppo"],
        "reasons": metrics["reasons"],
        "confirmed": metrics["confirmed"],
        "confirmed_differences": confirmed,
        "arms": {arm: entry["test"] for arm, entry in metrics["arms"].items()},
        "differences": differences(folder),
        "course": [{name: row[name] for name in course} for row in log],
        "drawn": drawn_reasons(reason_lines(folder), np.random.default_rng(7)),
    }


def gains(folder):
    """One-shot rewards of `rl` less `aligned`, paired over items with a 95 % bootstrap interval:
    in all and of the judge alone, without the penalties; of all items and of those that PPO was
    never asked about."""
    s = curec.Settings(**curec.read_config(folder)["settings"])
    data = curec.load_data(s)

    def kept(stage):
        return torch.load(folder / f"state/{stage}.pt", weights_only=True)["value"]

    data.sentences = kept("sentences")
    judge = reward.Judge(data, reward.load_encoder(s.encoder, "cpu"), s.seed)
    judge.load_weights(kept("reward")["weights"][-1])
    shown, audience = curec.one_shot_people(data, s.seed)
    items = [i for i in range(1, data.n_items + 1) if len(shown[i])]
    people = ([shown[i] for i in items], [audience[i] for i in items])
    total, lift = [], []
    for kind in ("aligned", "rl"):
        answers = kept(kind)
        texts = [answers[i] for i in items]
        found = reward.rewards(judge, items, texts, *people, reward.TRAIN_TIME)
        total.append(found.total)
        weight = found.audience_weight
        lift.append((1 - weight) * found.shown + weight * found.audience)
    updates, train, _ = curec.ppo_questions(s, data, curec.window_cuts(data, s.windows))
    group = curec.GROUP if s.baseline == "group" else 1
    asked = rl.draw(len(train), s.ppo_batch // group, updates, [s.seed, 19])
    unseen = ~np.isin(items, [train[k].item for k in asked.flatten()])
    rows = []
    for name, mine in (("all", unseen | ~unseen), ("not asked about", unseen)):
        for part, (before, after) in (("reward", total), ("judge alone", lift)):
            found = rec.paired_bootstrap(after[None, mine], before[None, mine])
            rows.append({"items": name, "count": int(mine.sum()), "part": part} | found)
    return rows


def write_sheet(folder):
    """sheet.json for the raters, key.json with the kinds."""
    settings = curec.read_config(folder)["settings"]
    data = curec.load_data(curec.Settings(**settings))
    rows = drawn_reasons(reason_lines(folder), np.random.default_rng(8))
    entries = []
    for row in rows:
        events = data.events_by_item[row["line"] + 1]
        reviews = [data.review(e) for e in events if data.review(e)][:3]
        about = {"item": D.item_text(data.items[row["line"] + 1]), "reviews": reviews}
        entries += [about | {"reason": row[kind], "kind": kind} for kind in KINDS]
    order = np.random.default_rng(9).permutation(len(entries))
    mixed = [entries[k] | {"number": n} for n, k in enumerate(order)]
    kinds = [entry.pop("kind") for entry in mixed]
    (folder / "sheet.json").write_text(json.dumps(mixed, indent=1, ensure_ascii=False))
    (folder / "key.json").write_text(json.dumps(kinds))
    print(f"{folder}/sheet.json: {len(mixed)} reasons")


def rated(folder, paths):
    """Shares by kind, both raters' mean, and how often they agree."""
    kinds = np.array(json.loads((folder / "key.json").read_text()))
    answers = []
    for path in paths:
        rows = sorted(json.loads(pathlib.Path(path).read_text()), key=lambda row: row["number"])
        answers.append([[bool(row[name]) for name in QUESTIONS] for row in rows])
    answers = np.array(answers)  # (raters, reasons, questions)
    out = []
    for kind in KINDS:
        shares = answers[:, kinds == kind].mean((0, 1))
        out.append({"kind": kind} | dict(zip(QUESTIONS, shares.tolist(), strict=True)))
    agreement = (answers[0] == answers[1]).mean(0)
    return [*out, {"kind": "agreement"} | dict(zip(QUESTIONS, agreement.tolist(), strict=True))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", nargs="+", type=pathlib.Path)
    parser.add_argument("--sheet", action="store_true")
    parser.add_argument("--rated", nargs=2)
    parser.add_argument("--gains", action="store_true")
    flags = parser.parse_args()
    path = HERE.with_suffix(".json")
    results = json.loads(path.read_text()) if path.exists() else {}
    for folder in flags.run:
        if flags.sheet:
            write_sheet(folder)
            continue
        entry = results.setdefault(folder.name, {})
        if flags.rated:
            entry["rated"] = rated(folder, flags.rated)
            print(curec.markdown(entry["rated"]))
        elif flags.gains:
            entry["gains"] = gains(folder)
            print(curec.markdown(entry["gains"]))
        else:
            entry |= figures(folder)
            for name in ("reasons", "arms"):
                rows = [{"kind": kind} | row for kind, row in entry[name].items()]
                print(f"\n{curec.markdown(rows) if name == 'reasons' else ''}")
            for name in ("confirmed_differences", "differences", "course", "drawn"):
                print(f"\n{curec.markdown(entry[name])}")
    if not flags.sheet:
        path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
