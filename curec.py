"""CURec on one GPU: an LLM writes why people choose an item, a recommender judges it, and the reasons help to rank.

    python curec.py --dataset demo            everything offline on a laptop CPU, in minutes
    data -> LLM (align) -> reward model -> PPO (policy) -> chronological correction -> SASRec with reasons -> report

Each stage leaves its result in the run folder, long ones after every update, epoch or window: from there --resume goes on. The hidden truth
of the demo world is read in two places of reward.py only, `tell_truth` and the features of the arm `oracle`, and feeds nothing else."""
import argparse, fcntl, functools, hashlib, importlib.metadata, json, os, platform, re, resource, shlex, shutil, signal, subprocess, sys, time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
def stop(number, frame):
    """Ctrl-C: every file is whole at any time, so nothing needs to be put in order."""
    print(f"\ninterrupted; go on with: python {shlex.join(a for a in sys.argv if a != '--resume')} --resume", file=sys.stderr, flush=True)
    os._exit(128 + number)
if __name__ in ("__main__", "__mp_main__"):           # before the imports that take seconds; worker processes end in silence
    signal.signal(signal.SIGINT, stop if __name__ == "__main__" else signal.SIG_DFL)
import numpy as np
import torch
from tqdm import tqdm
import data as D, recommender, reward, rl
from recommender import ARMS, COUNTING, METHODS, keep, run_arm, stage

DEFAULT_LLM = "Qwen/Qwen2.5-1.5B-Instruct"         # Apache-2.0; the default for real data where CUDA is at hand
opt = lambda usual, group, text, choices=None: field(default=usual, metadata={
    "group": group, "help": text + f" [{usual}]" * (usual not in ("", False)), "choices": choices})

@dataclass(frozen=True)
class Settings:
    dataset: str = opt("demo", "data", "demo | beauty | toys | sports | another Amazon category | a folder of your own")
    data_dir: str = opt("data", "data", "folder that holds, or receives, the downloaded files")
    ties: str = opt("file", "data", "order within a timestamp: file (as published numbers) | shuffle (honest)", ("file", "shuffle"))
    k_core: int = opt(-1, "data", "fewest interactions a user and an item must have; -1: 5 for a folder, else 0")
    limit_items: int = opt(0, "data", "keep the N items with most train interactions, then a 5-core; 0: all")
    limit_users: int = opt(0, "data", "then keep N users drawn by seed; 0: all")
    llm: str = opt("", "LLM", f"tiny | Hugging Face name or path; default: tiny for demo or CPU, else {DEFAULT_LLM}")
    encoder: str = opt("", "LLM", "Hugging Face text encoder, name or path; default: the LLM's own hidden states")
    tiny_steps: int = opt(0, "LLM", "training steps of the tiny LLM, 16 prompts each; 0: 1000 for demo, else 4000")
    align_steps: int = opt(200, "LLM", "supervised LoRA steps, 32 prompts each")
    temperature: float = opt(0.7, "LLM", "of reasons and PPO's answers; proposals to choose from are sampled at 1")
    max_new: int = opt(0, "LLM", "longest answer in tokens; 0: 24 for tiny, else 128")
    micro_batch: int = opt(0, "LLM", "rows a pass with gradients holds; lower it if memory runs out; 0: 16 for tiny, else 4")
    knowledge_steps: int = opt(600, "LLM", "supervised LoRA steps of the arm knowledge, 32 prompts each")
    ppo_updates: int = opt(20, "method", "PPO updates (sample, score, learn)")
    ppo_batch: int = opt(192, "method", "answers sampled for each PPO update")
    ppo_lr: float = opt(0.0, "method", "PPO learning rate; 0: 1.5e-3 for tiny, else 1e-5")
    windows: int = opt(2, "method", "time windows of the correction, equal in train events")
    proposals: int = opt(12, "method", "corrections proposed for an item and window")
    margin: float = opt(0.25, "method", "accept a correction if its paired gain exceeds this many standard errors")
    method: str = opt("curec", "evaluation", "whose arms: curec | lane | knowledge (two relatives, see README)", METHODS)
    arms: str = opt("", "evaluation", "instead: comma-separated arms, or all: " + ",".join(ARMS))
    seeds: int = opt(3, "evaluation", "downstream repeats of every arm")
    epochs: int = opt(60, "evaluation", "most downstream epochs; validation stops earlier")
    out: str = opt("", "run", "run folder; default runs/DATASET")
    seed: int = opt(0, "run", "seed of everything, the demo world included")
    device: str = opt("", "run", "cpu | cuda | cuda:1; default: cuda where there is one")
    quick: bool = opt(False, "run", "a tiny run of every stage, for CI: its figures mean nothing")
    resume: bool = opt(False, "run", "go on with the run folder after its last finished unit of work")
    dry_run: bool = opt(False, "run", "only print what would be downloaded, asked and learnt, and the memory it takes")
    debug: bool = opt(False, "run", "show the traceback of an error")
    run: str = opt("", "look at a finished run", "the run folder to look at")
    explain: str = opt("", "look at a finished run", "USER: this user's top items, each with its reason and the reason's history")
    score: str = opt("", "look at a finished run", "TEXT: the reward of a reason written by hand, as 'people choose it for X and Y'")
    item: str = opt("", "look at a finished run", "ID of the item that --score is about")

load_data = lambda s: D.load(s.dataset, s.data_dir, small=s.quick, **{k: getattr(s, k) for k in "seed ties k_core limit_items limit_users".split()})
QUICK = {"tiny_steps": 90, "align_steps": 12, "ppo_updates": 2, "ppo_batch": 32, "proposals": 2, "knowledge_steps": 12, "seeds": 1, "epochs": 3}
UNSAVED = "resume", "dry_run", "debug", "run", "explain", "score", "item"            # flags that are no setting of a run
sampling = lambda s: {"max_new": s.max_new, "temperature": s.temperature, "seed": s.seed, "budget": s.micro_batch * (2048 if s.llm == "tiny" else 8192)}

def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        "curec.py", description="CURec on one GPU: LLM reasons for recommendation, judged, reinforced, corrected in time.", allow_abbrev=False,
        epilog="Outputs in the run folder: report.md (read this), metrics.json, reasons.jsonl, ppo.jsonl, align/, policy/.",
        argument_default=argparse.SUPPRESS, formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=118))
    parser.error = lambda message: (print(f"curec.py: error: {message} (see --help)", file=sys.stderr), sys.exit(2))
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(f.metadata["group"] for f in fields(Settings))}
    for f in fields(Settings):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "metavar": f.name.split("_")[-1].upper(), "choices": f.metadata["choices"]}
        groups[f.metadata["group"]].add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"].replace("%", "%%"), **kind)
    given = vars(parser.parse_args(argv))
    looked = [k for k in ("explain", "item", "run", "score") if k in given]
    if looked not in ([], ["explain", "run"], ["item", "run", "score"]) or not all(given[k] for k in looked):
        raise D.DataError("--run DIR goes with --explain USER, or with --score TEXT and --item ID")
    return Settings(**{**(QUICK if "quick" in given else {}), **given})

def resolve(s: Settings) -> Settings:
    """Fills what depends on the machine and refuses what contradicts itself."""
    demo, device = s.dataset == "demo", s.device or ("cuda" if torch.cuda.is_available() else "cpu")
    arms = s.arms.split(",") if s.arms not in ("", "all") else [a for a in (ARMS if s.arms else METHODS[s.method]) if a != "oracle" or demo]
    least = {"k_core": -1, "ppo_batch": 8, "temperature": 0.01} | dict.fromkeys("seeds windows ppo_updates epochs align_steps knowledge_steps proposals".split(), 1)
    odd = [f.name for f in fields(Settings) if f.type in (int, float) and not least.get(f.name, 0) <= getattr(s, f.name) < 2 ** 31]      # nan too
    for wrong, message in (
            (not re.fullmatch(r"cpu|cuda(:\d+)?", device), f"--device {device}: it is cpu, cuda or cuda:N"),
            (device != "cpu" and int((device + ":0").split(":")[1]) >= torch.cuda.device_count(), f"--device {device}: PyTorch sees no such GPU; use --device cpu"),
            (demo and (s.limit_items or s.limit_users or s.ties != "file"), "--limit-items, --limit-users and --ties are for real data"),
            (set(arms) - set(ARMS), f"--arms: unknown {', '.join(set(arms) - set(ARMS))}; choose from {', '.join(ARMS)}"),
            (s.arms and s.method != "curec", "--method and --arms both choose arms: give one of them"),
            ("oracle" in arms and not demo, "--arms oracle: only the demo world knows its truth"),
            (odd, f"--{''.join(odd[:1]).replace('_', '-')}: too small or too large")):
        if wrong:
            raise D.DataError(message)
    tiny = (llm := s.llm or ("tiny" if demo or device == "cpu" else DEFAULT_LLM)) == "tiny"
    usual = {"max_new": 24, "micro_batch": 16, "ppo_lr": 1.5e-3} if tiny else {"max_new": 128, "micro_batch": 4, "ppo_lr": 1e-5}
    usual |= {"tiny_steps": 1000 if demo else 4000, "out": f"runs/{Path(s.dataset).resolve().name.lower()}"}
    return replace(s, device=device, llm=llm, arms=",".join(dict.fromkeys(arms)), **{k: getattr(s, k) or v for k, v in usual.items()})
# ------------------------------------------------------------------------------------------------------ run folder
def open_run(s: Settings):
    """Clears an older run out of the run folder, or checks that the run to resume was made with the same settings, and tells its commits."""
    out, config = Path(s.out), Path(s.out, "config.json")
    out.mkdir(parents=True, exist_ok=True)
    open_run.lock = open(out / ".lock", "w")
    try:
        fcntl.lockf(open_run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)                        # goes with the process, however that ends
    except (BlockingIOError, PermissionError):
        raise D.DataError(f"--out {s.out}: another run is at work there; wait until it has ended, or choose another folder") from None
    ours, begun = config.exists() and '"settings"' in config.read_text(), {"git_commit": ""}
    old = [part for folder in (out, out / "state") for part in folder.glob("*.[0-9]*.part") if ours]       # what a killed run was writing
    if s.resume:
        if not ours:
            raise D.DataError(f"--resume: {config} of a run does not exist; leave --resume out to start")
        begun = json.loads(config.read_text())                   # another micro-batch: same method, but other groups and so other samples
        if changed := [k for k, v in begun["settings"].items() if k != "micro_batch" and getattr(s, k, None) != v]:
            raise D.DataError(f"--resume: {s.out} was made with --{changed[0].replace('_', '-')} {begun['settings'][changed[0]]}")
    elif ours:
        old += [out / name for name in ("state", "align", "policy", "knowledge", "metrics.json", "reasons.jsonl", "ppo.jsonl", "report.md")]
    elif config.exists() or (out / "state").exists():
        raise D.DataError(f"--out {s.out}: holds a config.json or a folder 'state', but no run of ours; choose another folder")
    for path in old:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return begun["git_commit"]

def describe(s: Settings, cuts, begun: str) -> dict:
    """config.json: what another machine needs to know to repeat the run. begun: commits that a resumed run was made at so far."""
    git = "git", "-C", Path(__file__).resolve().parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"
    commit = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    return {"settings": {f.name: getattr(s, f.name) for f in fields(s) if f.name not in UNSAVED},
            "windows": cuts, "python": platform.python_version(), "git_commit": begun if commit in begun else ", ".join(filter(None, (begun, commit))),
            "versions": {p: importlib.metadata.version(p) for p in "torch transformers peft bitsandbytes accelerate numpy tqdm".split()},
            "hardware": {"cpus": os.cpu_count(), "machine": platform.platform(), "gpu": torch.cuda.get_device_name(s.device) if "cuda" in s.device else None}}
# -------------------------------------------------------------------------------------------- stages 1 to 4: the LLM
def tiny_llm(s: Settings, data, state=None, save=lambda state: None) -> str:
    """Path of the tiny LLM trained from nothing on this data set's texts and prompts, a catalogue's words first; cached by what it depends on."""
    rng = np.random.default_rng([s.seed, 41])
    easy, samples = (D.alignment_samples(data, n, rng, reason_share=1.0, people=most) for n, most in ((10_000, 1), (20_000, D.PEOPLE)))
    spell = [(D.reason_prompt(data, i, "", ()), " ".join(own)) for i, own in enumerate(data.phrases) if i and s.dataset != "demo"]
    parts = {"spelling": spell, "short prompts": easy, "all prompts": samples + D.lane_samples(data, 3000, rng)}
    lessons = [(name, part, round(x * s.tiny_steps)) for (name, part), x in zip(parts.items(), (0.25, 0.3, 0.45) if spell else (0, 0.4, 0.6)) if part]
    path = os.path.abspath(f"cache/tiny-{data.name}-") + hashlib.sha256(json.dumps([lessons, s.seed, 8]).encode()).hexdigest()[:12]
    if not os.path.exists(path):
        rl.train_tiny(path, [*map(D.item_text, data.items[1:])], lessons, D.TAGS, lower=bool(spell), seed=s.seed, device=s.device, state=state, save=save)
    return path

def taught(s: Settings, data, model, tokenizer, adapter: str, steps: int, times: dict, lr: float, **mixture):
    """Supervised training of an adapter on data.alignment_samples (mixture: its arguments), kept in the run folder."""
    def work(units):
        rl.use(model, adapter, trainable=True)
        pairs = D.alignment_samples(data, 32 * steps, np.random.default_rng([s.seed, 59]), **mixture)
        rl.supervise(model, tokenizer, pairs, steps=steps, batch=32, micro_batch=s.micro_batch, lr=lr, seed=s.seed, name=adapter, state=units.state, save=units.save)
        rl.save_adapter(model, s.out, adapter)
    stage(s, adapter, times, work)
    rl.restore(model, s.out, adapter)

def reinforce(s: Settings, data, model, tokenizer, judge, who, cuts, times: dict) -> dict:
    """PPO on the adapter `policy`; the score is R(answer) - mean R of two answers of `align` to the same prompt. Returns m["ppo"]."""
    items, prompts, people, ears, held, train = reward.practice(data, who, cuts, s.seed)
    train, held, found = train[: s.ppo_updates * s.ppo_batch], held if len(held) else train, {}            # more is never drawn
    def total(texts, rows):
        value, parts = judge.rewards([items[k] for k in rows], texts, [people[k] for k in rows], [ears[k] for k in rows], (cuts[0], cuts[-1]), s.seed)
        found.update({k: float(parts[k].mean()) for k in ("grounded", "format_ok")})
        return torch.from_numpy(value)
    sample = lambda rows, adapter, name: total(rl.ask(model, tokenizer, adapter, [prompts[k] for k in rows], **sampling(s), name=name), rows)
    def updates(units):
        def save(state):
            state["log"][-1] |= found                            # of the answers judged last: this update's
            keep(os.path.join(s.out, "ppo.jsonl"), "".join(json.dumps(row) + "\n" for row in state["log"]))
            units.save(state)
        log = rl.ppo(model, tokenizer, [prompts[k] for k in train], lambda texts, rows: total(texts, train[rows]) - reference[rows],
                     updates=s.ppo_updates, batch=s.ppo_batch, minibatch=s.ppo_batch // 3, micro_batch=s.micro_batch, epochs=1,
                     lr=s.ppo_lr, **sampling(s), state=units.state, save=save)        # one epoch: fresh answers beat reused ones here
        rl.save_adapter(model, s.out, "policy")
        return log
    before = stage(s, "before", times, lambda _: sample(held, "align", "held-out prompts before PPO"), "ppo")
    reference = stage(s, "reference", times, lambda _: sample(np.repeat(train, 2), "align", "reference: two answers a prompt").view(-1, 2).mean(1), "ppo")
    log = stage(s, "ppo", times, updates)
    rl.restore(model, s.out, "policy")
    after = stage(s, "after", times, lambda _: sample(held, "policy", "held-out prompts after PPO"), "ppo")
    return {"reward_before": before.mean().item(), "reward_after": after.mean().item(), "kl": log[-1]["kl"], "updates": len(log)}
# ----------------------------------------------------------------------------- stage 5: chronological correction
def propose(s: Settings, model, tokenizer, prompts, seed, name):
    """An answer a prompt for the judge to choose from: at temperature 1, every third by `align`, whose guesses PPO has not narrowed down."""
    hot = lambda adapter, some: iter(rl.ask(model, tokenizer, adapter, some, **sampling(s) | {"seed": seed, "temperature": 1.0, "name": f"{name}, by {adapter}"}))
    third, others = hot("align", prompts[::3]), hot("policy", [p for k, p in enumerate(prompts) if k % 3])
    return [next(others if k % 3 else third) for k in range(len(prompts))]

def correct(s: Settings, data, model, tokenizer, judge, who, cuts, state=None, save=lambda state: None):
    """Corrects every item's reason at the end of each window; nothing after it is in a prompt or a judgement. A third of its choosers are shown, others judge.
    state, save: what is done, window by window. Returns (first answers, last answers, timelines, people shown a prompt and judges by item, rows a window)."""
    alone = [D.reason_prompt(data, i, "", ()) for i in range(1, data.n_items + 1)]
    done = state or {"first": ["", *rl.ask(model, tokenizer, "policy", alone, **sampling(s), name="first reasons, from the text alone")], "windows": []}
    save(done)
    answers, (timelines, groups, ears) = [*done["first"]], ([[] for _ in done["first"]] for _ in range(3))
    for n, (w, period, items, shown, judges) in enumerate(reward.windows(data, who, cuts, s.seed)):
        if n == len(done["windows"]):
            prompts = [D.reason_prompt(data, i, D.parse_answer(answers[i])[0], p) for i, p in zip(items, shown)]
            proposals = propose(s, model, tokenizer, [p for p in prompts for _ in range(s.proposals)], s.seed + w, f"correction, window {w} of {len(cuts) - 1}")
            chosen, entries, row = judge.choose(items, [answers[i] for i in items], proposals, shown, judges, period, s.seed, s.margin)
            done["windows"].append((chosen, entries, {"window": w} | row))
            save(done)
        for i, p, j, answer, entry in zip(items, shown, judges, *done["windows"][n][:2]):
            answers[i] = answer
            timelines[i].append(entry), groups[i].append(p.tolist()), ears[i].extend(j.tolist())
    return done["first"], answers, timelines, groups, ears, [row for *_, row in done["windows"]]

def write_reasons(s: Settings, data, model, tokenizer, judge, who, cuts, times: dict):
    """Writes reasons.jsonl. Returns all kinds of reasons, {KIND: decoded answers, index 0 empty}, the lines of the file, and the correction's rows."""
    shown, items = reward.one_shot_people(who, s.seed)[0], list(range(1, data.n_items + 1))
    prompts = [D.reason_prompt(data, i, "", shown[i]) for i in items]
    one_shot = lambda adapter, kind: ["", *rl.ask(model, tokenizer, adapter, prompts, **sampling(s), name=f"reasons: {kind}")]
    def best(_):
        """The control for correction: its first reason and as many proposals, to the same groups of people, no reason so far; all judges at once."""
        asked = [(i, p) for i in items for p in groups[i] for _ in range(s.proposals)]
        texts = propose(s, model, tokenizer, [D.reason_prompt(data, i, "", p) for i, p in asked], s.seed + 91, "best of one-shot proposals")
        many, texts = np.array([*items, *(i for i, _ in asked)]), [*first[1:], *texts]
        people = [np.concatenate([*x, []]).astype(int) for x in groups], [np.array(x, int) for x in ears]
        total, _ = judge.rewards(many, texts, *([x[i] for i in many] for x in people), (cuts[0], cuts[-1]), s.seed)
        return [""] + [texts[max(np.flatnonzero(many == i), key=lambda k: total[k])] for i in items]
    kinds = {kind: stage(s, kind, times, lambda _: one_shot(adapter, kind), "correct") for kind, adapter in (("aligned", "align"), ("rl", "policy"))}
    first, kinds["curec"], timelines, groups, ears, rows = stage(s, "curec", times, lambda units: correct(
        s, data, model, tokenizer, judge, who, cuts, units.state, units.save), "correct")
    kinds["bestof"] = stage(s, "bestof", times, best, "correct")
    said = lambda kind, i: D.parse_answer(kinds[kind][i])[0]
    reasons = [{"item": item["id"], "title": item["title"], "aligned": said("aligned", i), "rl": said("rl", i), "timeline": timelines[i],
                "reason": said("curec", i)} for i, item in enumerate(data.items) if i]
    keep(os.path.join(s.out, "reasons.jsonl"), "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in reasons))
    return kinds, reasons, rows
# ------------------------------------------------------------------------------------------------- the two relatives
def prefer(s: Settings, data, model, tokenizer, state=None, save=lambda state: None):
    """LANE: what the untuned LLM says each user prefers, at two cuts of the train history. {"names": two lists a user, [] where five answers
    in a row were malformed; "since": (users, 2) lengths of the histories it saw}. state, save: as in rl.ppo, after every time of asking."""
    cuts = [(seq, max(1, n)) for seq in data.train for n in (len(seq) // 2, len(seq) - 1)]
    prompts = [D.question(data, seq[:n], "prefer", longest=D.LONGEST) for seq, n in cuts]
    (asked, names), how = state or (0, [[]] * len(prompts)), sampling(s) | {"max_new": max(64, s.max_new), "name": "preferences"}
    for attempt in range(asked + 1, 6):
        if todo := [k for k, named in enumerate(names) if not named]:
            with model.disable_adapter():
                for k, text in zip(todo, rl.generate(model, tokenizer, [prompts[k] for k in todo], **how | {"seed": s.seed + attempt})[0]):
                    names[k] = D.parse_preferences(text)
            save((attempt, names))
    return {"names": names, "since": torch.tensor([n for _, n in cuts]).view(-1, 2)}

def know(s: Settings, data, model, tokenizer, m: dict, tasks=("rank", "rate", "mim", "mlm", "bpr"), beams=20):
    """Trains the adapter `knowledge` (three of four samples ask what comes next, the others are of these tasks), fills m["knowledge"] and returns
    a score function for recommender.ranks: the titles that beam search finds, in their order; all others are a miss."""
    ask, paths = lambda h, *task: D.question(data, h, *task, longest=D.LONGEST), rl.title_trie(tokenizer, data.titles[1:])
    torch.manual_seed(s.seed)
    model.add_adapter("knowledge", replace(model.peft_config["align"], r=64, lora_alpha=128))           # it is to know the titles by heart
    taught(s, data, model, tokenizer, "knowledge", s.knowledge_steps, m["time_s"], lr=3e-3 if s.llm == "tiny" else 2e-4,
           reason_share=0.0, tasks=tasks, next_share=0.75, longest=D.LONGEST, ahead=D.LONGEST)
    rl.use(model, "knowledge")
    def score(sequences, users):
        found = 1 + rl.retrieve(model, tokenizer, [ask(h, "next") for h in sequences], *paths, beams=beams, budget=sampling(s)["budget"], name="beam search")
        return torch.full((len(found), data.n_items + 1), recommender.MISS).scatter_(1, found, torch.arange(beams, 0, -1.0).expand(found.shape))
    likelihood = lambda pairs: rl.likelihood(model, tokenizer, pairs, 4 * s.micro_batch)
    m["knowledge"] = stage(s, "knows", m["time_s"], lambda _: recommender.knows(data, ask, likelihood, s.seed))
    return score
# --------------------------------------------------------------------------------------------------------- the run
def open_llm(s: Settings, path: str):
    """The LLM in 4 bits with a new adapter, its tokenizer, and its text vectors as a function."""
    model, tokenizer = rl.load(path, s.device, checkpointing=s.device.startswith("cuda"), seed=s.seed)
    return model, tokenizer, lambda texts: rl.encode(model, tokenizer, texts, budget=sampling(s)["budget"])

def downstream(s, data, encode, kinds, preferences, score, m):
    """Trains and tests the arms; fills m's time_s, arms, comparisons and headroom. preferences: LANE's; score: the arm knowledge's."""
    slices, ranks, seconds, arms, start = recommender.slices_of(data), {}, {}, s.arms.split(","), time.perf_counter()
    with recommender.workers(s.device, len(arms) * s.seeds) as pool, tqdm(arms, "arms", unit="arm", disable=None) as bar:
        jobs = {arm: [pool.submit(stage, s, f"arm-{arm}.{k}", {}, functools.partial(run_arm, arm, data, inputs, slices, seed=k, epochs=s.epochs, device=s.device))
                      for inputs in [reward.features(arm, data, encode, kinds, s.seed, preferences)]
                      for k in range(s.seed, s.seed + (1 if arm in COUNTING else s.seeds))]
                for arm in arms if arm != "knowledge" and not os.path.exists(os.path.join(s.out, "state", f"arm-{arm}.pt"))}
        seconds["features"] = time.perf_counter() - start
        for arm in bar:
            done = stage(s, f"arm-{arm}", seconds, lambda _: recommender.together([job.result() for job in jobs[arm]] if arm in jobs else [
                run_arm(arm, data, {}, slices, argparse.Namespace(seconds=m["time_s"]["knowledge"]), seed=s.seed, score=score)]))
            ranks[arm], m["arms"][arm] = done["ranks"].numpy(), done["entry"]
            print(f"  {arm:10s} test NDCG@10 {np.mean(m['arms'][arm]['test']['ndcg@10']):.4f}")
    m["time_s"]["downstream"], m["comparisons"] = sum(seconds.values()), recommender.compare(ranks)
    m |= recommender.headroom(m["arms"])

def pipeline(s: Settings):
    """Runs every stage that the arms need and writes the run folder: config, metrics, reasons, ppo, report."""
    begin, todo, data = time.perf_counter(), reward.needed(s), load_data(s)
    announced = lambda name: name in todo and print(todo[name]) is None
    if "PPO" in todo and min(len(data.users), data.n_items) < 10:
        raise D.DataError(f"{data.name}: reasons need at least 10 people and 10 items; take more data, or --arms popularity,markov,id")
    cuts, who, begun = reward.window_cuts(data, s.windows), D.choosers(data), open_run(s)         # in this order: useless data cost no older run
    m = {"dataset": {"name": data.name, "users": len(data.users), "items": data.n_items, "interactions": sum(map(len, data.seqs)),
                     "ties": s.ties}, "arms": {}, "comparisons": [], "time_s": {"load": time.perf_counter() - begin}}
    print("{name}: {users:,} users, {items:,} items, {interactions:,} interactions".format(**m["dataset"]), *data.notes, sep="\n  note: ")
    config, encode, kinds, reasons, preferences, score = describe(s, cuts, begun), None, {}, [], None, None
    keep(os.path.join(s.out, "config.json"), json.dumps(config, indent=1))
    if announced("LLM"):
        path = stage(s, "tiny_llm", m["time_s"], lambda units: tiny_llm(s, data, units.state, units.save)) if s.llm == "tiny" else s.llm
        keep(os.path.join(s.out, "config.json"), json.dumps(config | {"llm_path": path}, indent=1))
        model, tokenizer, encode = open_llm(s, path)
    encode = reward.load_encoder(s.encoder, s.device) if s.encoder else encode
    if "PPO" in todo:
        taught(s, data, model, tokenizer, "align", s.align_steps, m["time_s"], lr=1e-3 if s.llm == "tiny" else 2e-4, reason_share=0.8, follow=0.0)
        print(todo["reward model"])
        judge = reward.Judge(data, encode)
        fit = stage(s, "reward", m["time_s"], lambda u: {"report": judge.fit(seed=s.seed, state=u.state, save=u.save), "weights": judge.model.state_dict()})
        judge.remember(fit["weights"])
        rl.add_policy(model)
        print(todo["PPO"])
        m["ppo"], m["reward"] = reinforce(s, data, model, tokenizer, judge, who, cuts, m["time_s"]), fit["report"]
        print(todo["reasons"])
        kinds, reasons, m["correction"] = write_reasons(s, data, model, tokenizer, judge, who, cuts, m["time_s"])
        m["reasons"] = {k: judge.figures(v, *reward.one_shot_people(who, s.seed), (cuts[0], cuts[-1]), s.seed) | {
            "mean_tokens": float(np.mean([len(tokenizer(a)["input_ids"]) for a in v[1:]]))} for k, v in kinds.items()}
    if announced("preferences"):
        preferences = stage(s, "prefer", m["time_s"], lambda units: prefer(s, data, model, tokenizer, units.state, units.save))
        m["lane"] = {"lists_asked": len(preferences["names"]), "lists_dropped": preferences["names"].count([])}
    if announced("knowledge"):
        score = know(s, data, model, tokenizer, m)
    print(todo["arms"])
    downstream(s, data, encode, kinds, preferences, score, m)
    if reasons and data.truth:
        reward.tell_truth(data, judge, who, cuts, kinds, m, s.seed)
    used = {"ram": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "gpu": torch.cuda.max_memory_allocated() / 2 ** 20}
    m["time_s"]["total"], m["peak_memory_mb"] = sum(m["time_s"].values()), {k: v for k, v in used.items() if v}
    keep(os.path.join(s.out, "metrics.json"), json.dumps(m, indent=1))
    notes = [f"LLM: {s.llm}" + ", trained from nothing on these texts" * (s.llm == "tiny"), *data.notes, *["**Quick run: these figures mean nothing.**"] * s.quick]
    keep(os.path.join(s.out, "report.md"), "\n\n".join(reward.report(m, reasons, notes)) + "\n")
    print("", *reward.tables(m).values(), *["quick run: these figures mean nothing"] * s.quick, f"report: {os.path.join(s.out, 'report.md')}", sep="\n\n")

def plan(s: Settings):
    """--dry-run: prints downloads, memory, and what each stage learns, reads and writes; downloads and writes nothing."""
    todo, here = reward.needed(s), s.dataset == "demo" or os.path.isdir(s.dataset)
    absent = {} if here else D.amazon_files(s.dataset, s.data_dir)[1]
    print(*(f"download {url} to {path}" for path, url in absent.items()), "memory: 1 to 2 GB of RAM for the tiny LLM and the recommender", sep="\n")
    for name in filter(None, (s.llm if "LLM" in todo and s.llm != "tiny" else "", s.encoder)):
        print(f"{name}: " + ", ".join(f"{k} {x if isinstance(x, bool | None) else f'{x:.3g}'}" for k, x in rl.forecast(name, sampling(s)["budget"]).items()))
    if absent:
        return print("prompts and tokens are counted when these files are there")
    data = load_data(s)
    who, cuts, n, drawn = D.choosers(data), reward.window_cuts(data, s.windows), data.n_items, s.ppo_updates * s.ppo_batch
    _, prompts, *_, held, train = reward.practice(data, who, cuts, s.seed)
    length = np.mean([len(re.findall(r"\w+|[^\w\s]", prompt)) for prompt in prompts])          # in words and signs: a token each, or a little more
    proposed = s.proposals * sum(len(items) for _, _, items, *_ in reward.windows(data, who, cuts, s.seed))
    rows = {"LLM": (16 * s.tiny_steps * (s.llm == "tiny") + 32 * s.align_steps * ("PPO" in todo), 0), "PPO": (0, 2 * len(held) + 2 * min(len(train), drawn) + drawn),
            "reasons": (0, 3 * n + 2 * proposed), "preferences": (0, 2 * len(data.users)), "knowledge": (32 * s.knowledge_steps, 2 * len(data.users))}
    print(recommender.markdown(["stage", "texts learnt", "answers", "tokens read, about", "tokens written, at most"], [
        [name, f"{a:,}", f"{b:,}", f"{(a + b) * length:,.0f}", f"{b * s.max_new:,}"] for name, (a, b) in rows.items() if name in todo]))

def look(s: Settings):
    """Prints a user's top items with their reasons (--method lane: with LANE's explanation of the first), or what a reason written by hand earns."""
    lane, load = bool(s.explain) and s.method == "lane", lambda name: torch.load(os.path.join(s.run, "state", name), weights_only=True)["value"]
    config = json.loads(Path(s.run, "config.json").read_text())
    kept, data = load("arm-lane.pt" if lane else "arm-curec.pt" if s.explain else "reward.pt"), load_data(old := Settings(**config["settings"]))
    known, name = (data.users, s.explain) if s.explain else ([item["id"] for item in data.items[1:]], s.item)
    if name not in known:
        raise D.DataError(f"{'--explain' if s.explain else '--item'} {name}: not in the data; some there are: {', '.join(known[:5])}")
    at, reasons = known.index(name), [] if lane else [json.loads(line) for _, line in D.lines(os.path.join(s.run, "reasons.jsonl"))]
    if s.explain:
        print(recommender.explain(data, kept["model"], at, lambda i: data.titles[i] if lane else reward.timeline(reasons[i - 1])))
        if lane:
            prompt, (model, tokenizer, _) = reward.lane_question(data, kept["model"], load("prefer.pt"), at), open_llm(old, config["llm_path"])
            with model.disable_adapter():
                print("\n" + prompt, *rl.generate(model, tokenizer, [prompt], **sampling(old) | {"max_new": 8 * old.max_new})[0], sep="\n\n")
        return
    judge = reward.Judge(data, reward.load_encoder(old.encoder, old.device) if old.encoder else open_llm(old, config["llm_path"])[2])
    judge.remember(kept["weights"])
    print(D.item_text(data.items[at + 1]) + "\n\n" + judge.table(at + 1, [s.score, reasons[at]["reason"]], D.choosers(data), config["windows"], old.seed))

def told(e: Exception, s) -> str:
    """What went wrong and what to do, in one line (a list of files may follow)."""
    where = f"in or after stage {getattr(stage, 'now', 'load')}"
    if isinstance(e, MemoryError) or re.search("out of memory|allocate memory|ALLOC_FAILED|terminated abruptly", str(e)):
        how = f"--resume --micro-batch {max(1, s.micro_batch // 2)}, or with a smaller --llm, --max-new or --limit-items"
        return f"out of memory on {s.device} {where} with --micro-batch {s.micro_batch}. What is finished is kept: go on with {how}"
    if re.search("No space left|quota exceeded|File too large|iostream error|inline_container", str(e)):
        return f"the disk is full ({e}) {where}. What is finished is kept: make room and go on with --resume"
    if isinstance(e, FileNotFoundError) and s and s.run:
        return f"--run {s.run}: {e.filename} is missing; it needs a finished run with the arm curec, or with lane and then also --method lane"
    return str(e) if isinstance(e, (D.DataError, OSError)) else f"{type(e).__name__}: {e} ({where}); --debug shows where, --resume goes on"

def main(argv=None) -> int:
    sys.stdout and sys.stdout.reconfigure(line_buffering=True)            # progress in a log file too
    s = None
    try:
        look(s) if (s := parse_args(argv)).run else (plan if s.dry_run else pipeline)(s := resolve(s))
        return 0
    except Exception as e:
        if getattr(s, "debug", False):
            raise
        print(f"curec.py: error: {told(e, s)}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main())
