"""Datasets, splits and prompts: everything that turns interactions into tensors or text.

    interactions -> one chronological sequence a user -> train | valid (last but one) | test (last)
    event e = (user, position >= 1) of a train choice: who chose which item when, and what that person had chosen before

Items are numbered 1..n; 0 is padding. Sources: the made-up `demo` world, whose hidden truth (why each item is chosen)
sits in Dataset.truth and is read by reward.py's truth figures and oracle arm alone; Amazon 2014 and 2018 files; a folder
of your own. Everything that trains a model reads `train`, `events` and `items` only: never valid, test or truth.

Left out: images, prices.  Try it alone:
    python -c "import data; d = data.demo(0); print(d.items[1], data.reason_prompt(d, 1, '', data.choosers(d)[1]), sep='\\n')"
"""
import ast, csv, gzip, html, http.client, json, os, re, unicodedata, urllib.request, zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from tqdm import tqdm

ALIASES = {"beauty": "Beauty", "toys": "Toys_and_Games", "sports": "Sports_and_Outdoors"}
FILES = (("reviews_{}_5.json.gz", "meta_{}.json.gz"), ("{}_5.json.gz", "meta_{}.json.gz"))        # Amazon 2014 | 2018
SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
UCSD = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/"
URLS = ((SNAP + FILES[0][0], SNAP + FILES[0][1]), (UCSD + "categoryFilesSmall/" + FILES[1][0], UCSD + "metaFiles2/" + FILES[1][1]))
HISTORY, PEOPLE = 3, 4             # items shown of each person's history; people shown in a prompt (H)
PREFERENCES, LONGEST = 5, 10       # preferences a user (LANE's m); items of a history that the two relatives show
TITLE_WORDS, TEXT_WORDS = 12, 40   # longest title and item text in a prompt, in words
MIN_ITEMS = 5                      # a word found in fewer items identifies an item: it is masked from rewards
STOPWORDS = frozenset(  # the last line: sizes
    "a about above all also an and any are as at be been by can de for from has have how in into is it its la le me more most new no none not of off on one or "
    "other our out over per so than that the their them these they this to too two up use used very was we what when which who will with you your "
    "count fl fluid inch inches ml ounce ounces oz pack pcs set size value".split())
stem = lambda word: re.sub(r"(?<=ss|sh|ch)es$|(?<=x)es$|(?<=[^s])s$", "", word)                   # nail and nails, brush and brushes: one word

class DataError(ValueError):
    """Bad or missing input; the message says what to do."""

@dataclass
class Dataset:
    name: str
    items: list                    # items[i] = {"id", "title", "brand", "categories", "description"}; items[0] padding
    users: list                    # source ids
    seqs: list                     # per user: item numbers in time order, (L,) int64
    times: list                    # per user: seconds, (L,) int64
    ratings: list | None = None    # per user: (L,) float, or None where the source has none
    truth: dict | None = None      # demo only: {"early", "late": drivers of every item, "since": time of change}, index 0 unused
    notes: list = field(default_factory=list)    # what was skipped and why, for the summary

    def __post_init__(self):
        assert all((np.diff(t) >= 0).all() for t in self.times), "sequences must be chronological"
        self.n_items, self.train = len(self.items) - 1, [s[:-2] for s in self.seqs]
        self.valid, self.test = (np.array([s[k] for s in self.seqs]) for k in (-2, -1))

    @cached_property
    def events(self):
        """Train choices that have a history: dict of (E,) arrays user, pos, item, time, sorted by time (stable)."""
        rows = [(u, p, s[p], t[p]) for u, (s, t) in enumerate(zip(self.train, self.times)) for p in range(1, len(s))]
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        table = table[np.argsort(table[:, 3], kind="stable")]
        return dict(zip(("user", "pos", "item", "time"), table.T))

    @cached_property
    def counts(self):
        """Train interactions of each item, (n_items + 1,)."""
        return np.bincount(np.concatenate(self.train), minlength=self.n_items + 1)

    @cached_property
    def titles(self):
        """Each item's title in a prompt; equal ones get a number, so that a title names one item."""
        seen, out, same = Counter(), [""], lambda title: unicodedata.normalize("NFKC", title).lower()
        for item in self.items[1:]:
            name = short = " ".join((item["title"] or "untitled").split()[:TITLE_WORDS])
            while seen[same(name)]:
                seen[same(short)] += 1
                name = f"{short} ({seen[same(short)]})"
            seen[same(name)] += 1
            out.append(name)
        return out

    @cached_property
    def document_frequency(self):
        return Counter(w for item in self.items[1:] for w in set(words(item_text(item))))

    @cached_property
    def masked_words(self):
        """Words that tell which item it is (in fewer than MIN_ITEMS items, brands): never shown to the reward's encoder."""
        branded = Counter(w for item in self.items[1:] for w in set(words(item["brand"])))
        return {w for w, n in self.document_frequency.items() if n < MIN_ITEMS or branded[w] > n / 2}

    @cached_property
    def common_words(self):
        return {w for w, n in self.document_frequency.items() if n > self.n_items / 2} | STOPWORDS | {"people", "choose"}

    @cached_property
    def phrases(self):
        """What an item says about itself and a reason may name: its words, each in one form, less masked and common ones."""
        out = [[]]
        for item in self.items[1:]:
            own = [*{stem(w): w for w in words(item_text(item)) if w not in self.common_words and not w[0].isdigit()}.values()]
            clear = [w for w in own if w not in self.masked_words]
            out.append(clear if len(clear) >= 2 else own)
        return out

    def history(self, event: int) -> np.ndarray:
        """What the person of a train event had chosen before it, oldest first."""
        return self.train[self.events["user"][event]][: self.events["pos"][event]]

def words(text: str) -> list:
    return re.findall(r"[a-z0-9][a-z0-9'-]*", text.lower())

def item_text(item: dict) -> str:
    """All that an item says about itself, one line."""
    parts = item["title"], item["brand"] and "by " + item["brand"], ", ".join(item["categories"][-2:]), item["description"]
    return " ".join(" . ".join(p for p in parts if p).split()[:TEXT_WORDS]) or "no description"

# ------------------------------------------------------------------------------------------------ the made-up world
ASPECTS = "pockets wheels warmth silence colour scent storage grip comfort speed shade privacy elegance humour calm".split()
BRANDS = "Velora Nordel Quisp Tamber Ostrel Brinda Kelmo Farrow Zintra Palou Merith Dovane".split()

def demo(seed: int, n_users: int = 1000, n_items: int = 500) -> Dataset:
    """A shop whose every item says five aspects but is chosen for two of them only (the drivers; the rest are decoys).
    25 % of the items swap one driver half-way through time; 30 % of the users swap one of their three needs.
    A person picks item i at time t with probability ~ exp(4 m + 2 [m = 2] + popularity_i), m = |drivers(i, t) & needs(u, t)|."""
    rng = np.random.default_rng([seed, 7])
    K, span = len(ASPECTS), 100_000_000                                        # about three years of seconds
    said = np.array([rng.permutation(K)[:5] for _ in range(n_items)])
    early = np.array([rng.permutation(s)[:2] for s in said])
    late = early.copy()
    for i in np.flatnonzero(rng.random(n_items) < 0.25):
        late[i, rng.integers(2)] = rng.choice([a for a in said[i] if a not in early[i]])
    drives = [(drivers[..., None] == np.arange(K)).any(1) for drivers in (early, late)]                # (items, K) before and after
    popularity, seqs, times = rng.normal(0, 0.3, n_items), [], []
    for _ in range(n_users):
        wants = rng.permutation(K)[:4]
        needs = [wants[:3], wants[1:] if rng.random() < 0.3 else wants[:3]]
        when = np.sort(rng.integers(0, span, rng.integers(9, 14)))
        open_items, chosen = np.ones(n_items, bool), []
        for t in when:
            matches = drives[half := int(t > span // 2)][:, needs[half]].sum(1)
            utility = 4 * matches + 2 * (matches == 2) + popularity + rng.gumbel(size=n_items)
            chosen.append(int(np.where(open_items, utility, -np.inf).argmax()))
            open_items[chosen[-1]] = False
        seqs.append(np.array(chosen) + 1), times.append(when + 1_400_000_000)
    items = [{}] + [{"id": f"D{i + 1:04d}", "title": " ".join(ASPECTS[a] for a in s), "categories": [],
                     "brand": BRANDS[rng.integers(len(BRANDS))], "description": ""} for i, s in enumerate(said)]
    names = [[()] + [tuple(ASPECTS[a] for a in d) for d in drivers] for drivers in (early, late)]
    return Dataset("demo", items, [f"user{u}" for u in range(n_users)], seqs, times,
                   truth={"early": names[0], "late": names[1], "since": [span // 2 + 1_400_000_000] * (n_items + 1)})

# --------------------------------------------------------------------------------------------------- real data sets
def load(name: str, data_dir: str = "data", *, seed=0, ties="file", k_core=-1, limit_items=0, limit_users=0,
         small=False) -> Dataset:
    """`demo`, an Amazon category (2014 or 2018 files, found in data_dir or downloaded there), or a folder's path.
    ties: "file" keeps the source's order within a timestamp, "shuffle" draws it by seed. k_core: -1 = 5 for a folder, else
    0; limit_items, limit_users: 0 = off. Raises DataError with what to do."""
    if name == "demo":
        return demo(seed, *(200, 120) if small else (1000, 500))
    if os.path.isdir(name):
        rows, records, notes = read_folder(name)
        k_core = 5 if k_core < 0 else k_core
    elif os.sep in name:
        raise DataError(f"{name}: no such folder; it needs interactions.csv and items.jsonl")
    else:
        rows, records, notes = read_amazon(ALIASES.get(name.lower(), name), data_dir)
    if ties == "shuffle":
        rows = [rows[i] for i in np.random.default_rng([seed, 11]).permutation(len(rows))]
    rows.sort(key=lambda r: r[2])                                              # list.sort is stable
    unique = {}
    for r in rows:
        unique.setdefault(r[:2], r)
    notes += [f"{n} repeated user-item pairs: the first is kept" for n in [len(rows) - len(unique)] if n]
    rows = core(list(unique.values()), k_core)
    if limit_items:
        left, train = Counter(r[0] for r in rows), Counter()
        for r in rows:                             # rows are chronological: a user's last two are valid and test
            left[r[0]] -= 1
            train[r[1]] += left[r[0]] >= 2
        keep = {i for i, _ in sorted(train.items(), key=lambda kv: (-kv[1], kv[0]))[:limit_items]}
        rows = core([r for r in rows if r[1] in keep], 5)
    if limit_users:
        keep = set(np.random.default_rng([seed, 13]).permutation(sorted({r[0] for r in rows}))[:limit_users].tolist())
        rows = [r for r in rows if r[0] in keep]
    return from_rows(os.path.basename(os.path.normpath(name)), rows, records, notes)

def core(rows: list, k: int) -> list:
    """The k-core: every user and every item left has at least k interactions."""
    while k > 1:
        users, items = Counter(r[0] for r in rows), Counter(r[1] for r in rows)
        rows, before = [r for r in rows if users[r[0]] >= k and items[r[1]] >= k], len(rows)
        if len(rows) == before:
            break
    return rows

def from_rows(name, rows, records, notes) -> Dataset:
    """rows: (user id, item id, time, rating or None), sorted; records: item id -> record."""
    by_user = {}
    for r in rows:
        by_user.setdefault(r[0], []).append(r)
    if short := [u for u, mine in by_user.items() if len(mine) < 3]:
        notes.append(f"{len(short)} users with fewer than 3 interactions: left out")
        by_user = {u: mine for u, mine in by_user.items() if len(mine) >= 3}
    if not by_user:
        raise DataError(f"{name}: no user has 3 interactions left; lower --k-core or the limits, or check the files")
    users, ids = sorted(by_user), sorted({r[1] for mine in by_user.values() for r in mine})
    number = {x: i + 1 for i, x in enumerate(ids)}
    items = [{}] + [record(x, records.get(x, {})) for x in ids]
    notes += [f"{n} items without a title" for n in [sum(not item["title"] for item in items[1:])] if n]
    take = lambda column, as_=lambda x: x: [np.array([as_(r[column]) for r in by_user[u]]) for u in users]
    rated, some = (how(r[3] in (1, 2, 3, 4, 5) for mine in by_user.values() for r in mine) for how in (all, any))
    notes += ["not every rating is 1, 2, 3, 4 or 5: ratings are left out"] * (some and not rated)
    return Dataset(name, items, users, take(1, number.get), take(2), take(3) if rated else None, notes=notes)

def clean(value) -> str:
    """One line of plain text: entities unescaped, markup and control tokens dropped, 'None' and 'nan' read as empty."""
    if isinstance(value, (list, tuple)):
        value = " ".join(str(v) for v in value)
    text = html.unescape(html.unescape("" if value is None else str(value)))
    text = " ".join(re.sub(r"<[^<>]*>", " ", text).replace("<", " ").replace(">", " ").split())
    return "" if text.lower() in ("nan", "none", "null") else text

def record(id, r: dict) -> dict:
    """An item from any source's fields; Amazon's categories are a list of paths in 2014, one path in 2018."""
    path = r.get("categories") or r.get("category") or []
    path = path if isinstance(path, list) else [path]
    path = path[0] if path and isinstance(path[0], list) else path
    return {"id": str(id), **{k: clean(r.get(k)) for k in ("title", "brand", "description")}, "categories": [c for c in map(clean, path) if c]}

def lines(path: str):
    """(number, text) of each line of a text or gzip file, with progress; DataError if the file is not what its name says."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig", errors="replace") as f:
            yield from enumerate(tqdm(f, "reading " + os.path.basename(path), unit=" lines", leave=False, disable=None, delay=1), 1)
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path}: cannot be read to its end ({e}); delete it and download it again") from e

def parse_line(line: str) -> dict | None:
    """A JSON object or, in Amazon 2014 meta files, a Python dict literal (literal_eval runs no code)."""
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(line)
            return value if isinstance(value, dict) else None
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return None

def interactions(path: str, found, user: str, item: str, when: str, rating: str, advice: str):
    """Rows (user, item, time, rating or None) of a source's dicts, or what else its lines held, and a note of what was skipped."""
    rows, bad = [], 0
    for r in found:
        try:
            given = r.get(rating)
            rows.append((str(r[user]), str(r[item]), int(float(r[when])), None if given in (None, "") else float(given)))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            bad += 1
    if not rows:
        raise DataError(f"{path}: no line has {user}, {item} and a readable {when}; {advice}")
    return rows, [f"{bad} lines of {os.path.basename(path)} without {user}, {item} or a readable {when}: skipped"] * (bad > 0)

def read_amazon(category: str, data_dir: str):
    """Rows and item records of an Amazon category, 2014 or 2018 files; downloads the 2014 pair if neither is there."""
    path = lambda year, kind: os.path.join(data_dir, FILES[year][kind].format(category))
    year = int(not os.path.exists(path(0, 0)) and os.path.exists(path(1, 0)))
    reviews, meta = path(year, 0), path(year, 1)
    if wanted := {path(year, k): URLS[year][k].format(category) for k in (0, 1) if not os.path.exists(path(year, k))}:
        download(category, wanted, data_dir)
    rows, notes = interactions(reviews, (parse_line(line) for _, line in lines(reviews)), "reviewerID", "asin", "unixReviewTime", "overall",
                               "is it the 5-core review file?")
    records, bad, needed, asin = {}, 0, {r[1] for r in rows}, re.compile(r"""['"]asin['"]\s*:\s*['"]([^'"]*)['"]""")
    for _, line in lines(meta):
        named = asin.search(line)                  # cheap test first: the full meta files have ten times the items
        if named and named[1] in needed and named[1] not in records:
            r = parse_line(line)
            bad += r is None
            if r is not None:
                records[named[1]] = {k: r.get(k) for k in ("title", "brand", "description", "categories", "category")}
    return rows, records, notes + [f"{bad} lines of {os.path.basename(meta)} that cannot be read: skipped"] * (bad > 0)

def read_folder(folder: str):
    """Your own data: interactions.csv (user,item,timestamp[,rating]) and items.jsonl (id,title[,brand,...])."""
    path, catalogue = (os.path.join(folder, name) for name in ("interactions.csv", "items.jsonl"))
    if missing := [name for name in (path, catalogue) if not os.path.exists(name)]:
        raise DataError(f"{missing[0]} is missing; a folder needs interactions.csv (user,item,timestamp[,rating]) "
                        "and items.jsonl (id,title[,brand,categories,description])")
    reader = csv.DictReader(line.replace("\0", "") for _, line in lines(path))
    if not {"user", "item", "timestamp"} <= set(reader.fieldnames or ()):
        raise DataError(f"{path}: the first line must name the columns user,item,timestamp[,rating]")
    rows, notes = interactions(path, reader, "user", "item", "timestamp", "rating", "it must be a number, seconds since 1970")
    records = {}
    for n, line in lines(catalogue):
        if line.strip():
            if "id" not in (r := parse_line(line) or {}):
                raise DataError(f"{catalogue} line {n}: not a JSON object with an id; mend or remove the line")
            records[str(r["id"])] = r
    return rows, records, notes

def download(category: str, wanted: dict, data_dir: str):
    """Fetches missing files, {path: address}: progress bar, .part file, size and gzip check, then an atomic rename."""
    for path, url in wanted.items():
        part = path + ".part"
        try:
            with urllib.request.urlopen(url, timeout=20) as source, (os.makedirs(data_dir, exist_ok=True) or open(part, "wb")) as out:
                size = int(source.headers.get("Content-Length") or 0)
                with tqdm(total=size or None, unit="B", unit_scale=True, desc=f"downloading {os.path.basename(path)}") as bar:
                    while chunk := source.read(1 << 20):
                        out.write(chunk)
                        bar.update(len(chunk))
            if size and os.path.getsize(part) != size:
                raise OSError(f"{os.path.getsize(part)} of {size} bytes came")
            with gzip.open(part) as f:
                while f.read(1 << 20):
                    pass                                                       # to the end: the checksum stands there
            os.replace(part, path)
        except (OSError, EOFError, zlib.error, http.client.HTTPException) as e:           # URLError is an OSError
            if os.path.exists(part):
                os.remove(part)
            files = "\n".join(f"  {os.path.basename(p)}  from  {u}" for p, u in wanted.items())
            raise DataError(f"data set '{category}' is not in {os.path.abspath(data_dir)} and could not be downloaded ({e}).\n"
                            f"Put there by hand:\n{files}\nor name their folder with --data-dir. `--dataset demo` needs no files.") from e

# ---------------------------------------------------------------------------------------------- prompts and parsing
REASON = "people choose it for {} and {}"
ANSWER = "<think> {} </think> <reason> {} </reason>"
ANSWER_PATTERN = re.compile(r"\s*<think>([^<>]{0,2000})</think>\s*<reason>([^<>]{0,2000})</reason>\s*")
REASON_PATTERN = re.compile(r"people choose it for (.{1,80}?) and (.{1,80}?)")
PROMPT = "Buyers of an item had chosen before:\n{}\nReason so far: {}\nItem: {}\nWhy do people choose it?"
TAGS = ("<think>", "</think>", "<reason>", "</reason>")
TASKS = {"mim": "Which item is blank?", "mlm": "Which word is blank?", "bpr": "Which is preferred: {}?", "next": "What comes next?",
         "rank": "Which of these comes next: {}?", "rate": "Which rating from 1 to 5 for {}?"}                   # after arXiv 2404.00245
LANE = {"prefer": f"You know what people look for. Name {PREFERENCES} different preferences, names only, that explain best what this person chooses next, as JSON: "
                  '{{"preferences": ["...", "..."]}}',                                    # after arXiv 2407.02833
        "explain": "Preferences and their weights: {}\nItem: {}\nExplain step by step: which choices show each preference; how well, 0 to 1, the item fits it; "
                   "that times its weight as low, medium or high; then recommend the item."}

def reason_prompt(data: Dataset, item: int, reason: str, events) -> str:
    """The one prompt for reasons: up to PEOPLE histories (of these train events), the reason so far ("" = none), item text."""
    shown = ["- " + "; ".join(data.titles[i] for i in data.history(e)[-HISTORY:]) for e in events[:PEOPLE]]
    return PROMPT.format("\n".join(shown) or "- nobody yet", reason or "none", item_text(data.items[item]))

def parse_answer(text: str) -> tuple:
    """Decoded answer -> (reason, named phrases, format_ok). The format: one think, one reason, two different phrases."""
    answer = ANSWER_PATTERN.fullmatch(text[:10_000])
    if not answer:
        return "", [], False
    reason = " ".join(answer[2].split())
    named = [p.strip() for p in found.groups()] if (found := REASON_PATTERN.fullmatch(reason)) and " and " not in found[2] else []
    return reason, named, len({" ".join(map(stem, words(p))) for p in named} - {""}) == 2

def grounded(data: Dataset, item: int, reason: str) -> float:
    """Share of the reason's content words that the item's own text says; 0 for a reason without any."""
    content, said = [w for w in words(reason) if w not in STOPWORDS | {"people", "choose"}], set(words(item_text(data.items[item])))
    return sum(w in said for w in content) / len(content) if content else 0.0

def mask_identity(data: Dataset, text: str) -> str:
    """The words of a text, sorted, without brands, numbers, common ones and those only a few items have: what the reward's encoder reads."""
    kept = [w for w in words(text) if w not in data.masked_words and w not in data.common_words and not w[0].isdigit()]
    return " ".join(sorted(kept)) or "item"

def random_reason(data: Dataset, item: int, rng, size: int = 2) -> str:
    """A grounded reason that names phrases of the item drawn at random (weak supervision knows no better)."""
    own = data.phrases[item]
    named = [own[i] for i in sorted(rng.permutation(len(own))[:size])]
    return REASON.format(*named) if len(named) == 2 else "people choose it for " + " and ".join(named or ["itself"])

def shared_words(data: Dataset, item: int, events) -> list:
    """The item's phrases that the histories shown of these train events say too, most shared first."""
    said = Counter(w for e in events[:PEOPLE] for i in data.history(e)[-HISTORY:] for w in words(data.titles[i]))
    return sorted((w for w in data.phrases[item] if said[w]), key=lambda w: -said[w])

def reason_sample(data: Dataset, item: int, events, rng, current: str = "", follow: float = 1.0) -> tuple:
    """(prompt, answer) with a weak target: the thought names the item's two words most shared with the histories shown.
    The reason names them in a share `follow` of the samples, else two at random: what matters is left to the reward. In item order."""
    own = data.phrases[item]
    shared = sorted(shared_words(data, item, events)[:2], key=own.index)
    think, kept = "most shared " + " and ".join(shared) if shared else "nothing shared", shared if rng.random() < follow else []
    named = sorted([*kept, *(w for w in rng.permutation(own) if w not in kept)][:2], key=own.index)
    return reason_prompt(data, item, current, events), ANSWER.format(think, REASON.format(*named))

def choosers(data: Dataset) -> list:
    """For each item the train events that chose it: a list of arrays of event numbers, index 0 empty."""
    order = np.argsort(data.events["item"], kind="stable")
    return np.split(order, np.cumsum(np.bincount(data.events["item"], minlength=data.n_items + 1))[:-1])

def question(data: Dataset, history, task: str, *about, longest: int = HISTORY) -> str:
    """A question of one of the two relatives (TASKS, LANE) about the last items of a history."""
    return "Chosen in order: " + "; ".join(data.titles[i] for i in history[-longest:]) + "\n" + (TASKS | LANE)[task].format(*about)

def alignment_samples(data: Dataset, n: int, rng, reason_share: float = 0.5, people: int = PEOPLE, follow: float = 1.0,
                      tasks=tuple(TASKS), next_share: float = 0.0, longest: int = HISTORY, ahead: int = 1) -> list:
    """n (prompt, answer) pairs from the train split alone: reasons and the tasks of recommendation knowledge (arXiv 2404.00245), each train
    choice once before any again. next_share: more of `next`; its answer goes on for up to `ahead` items, a line each. longest: see question."""
    who, out, events = choosers(data), [], data.events
    nameable = [i for i in range(1, data.n_items + 1) if len(data.phrases[i]) >= 2]
    choices, tasks = [], [t for t in tasks if t != "rate" or data.ratings]
    for _ in range(n):
        if nameable and (not len(events["user"]) or rng.random() < reason_share):
            item = int(nameable[rng.integers(len(nameable))])
            shown = rng.permutation(who[item])[: rng.integers(people + 1)]     # fewer people: shorter, easier
            current = random_reason(data, item, rng) if rng.random() < 0.5 else ""
            out.append(reason_sample(data, item, shown, rng, current, follow))
            continue
        choices = choices or rng.permutation(len(events["user"])).tolist()
        choice = choices.pop()
        user, end = int(events["user"][choice]), int(events["pos"][choice])
        s, task = data.train[user], "next" if rng.random() < next_share else tasks[rng.integers(len(tasks))]
        past, goal = s[max(0, end - longest): end], data.titles[s[end]]        # s[end] is the choice to be told
        others = [j for j in dict.fromkeys(rng.integers(1, data.n_items + 1, 8).tolist()) if j not in s][:2]
        if task in ("mim", "mlm"):         # blank an item of the history, or a word of its titles
            parts, gap = ([data.titles[i] for i in past], "; ") if task == "mim" else ("; ".join(data.titles[i] for i in past).split(), " ")
            hide = int(rng.integers(len(parts)))
            shown = gap.join([*parts[:hide], "____", *parts[hide + 1:]] + [goal] * (task == "mim"))
            out.append((f"Chosen in order: {shown}\n{TASKS[task]}", parts[hide].strip(";") or ";"))
            continue
        if task in ("bpr", "rank") and others:
            some = [s[end], *others[: 1 if task == "bpr" else None]]
            about, answer = ["; ".join(data.titles[j] for j in rng.permutation(some))], goal
        elif task == "rate":
            about, answer = [goal], f"{data.ratings[user][end]:.0f}"
        else:
            task, about, answer = "next", (), "\n".join(data.titles[i] for i in s[end: end + ahead])
        out.append((question(data, past, task, *about, longest=longest), answer))
    return out

def parse_preferences(text: str) -> list:
    """The PREFERENCES different names in an answer's JSON object; [] if it is malformed or has another number."""
    found = re.search(r"\{[^{}]*\}", text[:10_000])
    names = (parse_line(found[0]) or {}).get("preferences") if found else None
    names = [clean(n)[:80] for n in names if isinstance(n, str)] if isinstance(names, list) else []
    return names if len({n.lower() for n in names} - {""}) == len(names) == PREFERENCES else []

def lane_samples(data: Dataset, n: int, rng) -> list:
    """n (prompt, answer) pairs that teach a model from nothing the form of LANE's answers; a pretrained LLM needs none.
    Weak targets: preferences are the most frequent words of the history's items, and an item fits one if it says it."""
    out, rich = [], [s for s in data.train if len({w for i in s[-LONGEST:] for w in data.phrases[i]}) >= PREFERENCES]
    while rich and len(out) < n:
        s, item, task = rich[rng.integers(len(rich))], int(rng.integers(1, data.n_items + 1)), ("prefer", "prefer", "explain")[rng.integers(3)]
        past = s[: rng.integers(1, len(s) + 1)][-LONGEST:]
        # in alphabetical order: a model that has learnt to go on in it repeats nothing
        names = sorted(w for w, _ in Counter(w for i in past for w in data.phrases[i]).most_common(PREFERENCES))
        if len(names) < PREFERENCES:
            continue
        about, answer = (), json.dumps({"preferences": names})
        if task == "explain":
            weights, fits = rng.dirichlet(np.full(PREFERENCES, 3.0)).round(2), [w in data.phrases[item] for w in names]
            about = ", ".join(f"{w} {x:.2f}" for w, x in zip(names, weights)), item_text(data.items[item])
            shown = [next(data.titles[i] for i in past[::-1] if w in data.phrases[i]) for w in names]
            steps = [f"{w} in {t} , fit {fit:d} , {'low' if not fit else 'medium' if x < 0.2 else 'high'}" for w, t, fit, x in zip(names, shown, fits, weights)]
            answer = " ; ".join(steps) + " ; it has " + " and ".join([w for w, fit in zip(names, fits) if fit] or ["something new"])
        out.append((question(data, past, task, *about, longest=LONGEST), answer))
    return out
