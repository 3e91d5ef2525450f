"""Datasets, splits and prompts: everything that turns interactions into tensors or text.

    interactions -> one chronological sequence a user -> train | valid (last but one) | test (last)
    event e = (user, position >= 1) of a train choice: who chose which item when, and what that person had chosen before

Items are numbered 1..n; 0 is padding. Sources: Amazon 2014 and 2018 files; a folder of your own; the made-up `demo` world, whose hidden truth
(why each item is chosen) only reward.py's truth figures and oracle arm read. All that trains a model reads `train`, `events` and `items` alone.
Try it alone:  python -c "import data; d = data.demo(0); print(d.items[1], data.reason_prompt(d, 1, '', data.choosers(d)[1]), sep='\\n')"
"""
import ast, csv, gzip, html, http.client, json, os, re, unicodedata, urllib.request, zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import groupby

import numpy as np
from tqdm import tqdm

ALIASES = {"beauty": "Beauty", "toys": "Toys_and_Games", "sports": "Sports_and_Outdoors"}
SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"                         # Amazon 2014
UCSD = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/"                               # and 2018
URLS = (SNAP + "reviews_{}_5.json.gz", SNAP + "meta_{}.json.gz"), (UCSD + "categoryFilesSmall/{}_5.json.gz", UCSD + "metaFiles2/meta_{}.json.gz")
HISTORY, PEOPLE = 3, 4             # items shown of each person's history; people shown in a prompt (H)
PREFERENCES, LONGEST = 5, 10       # preferences a user (LANE's m); items of a history that the two relatives show
TITLE_WORDS, TEXT_WORDS, MIN_ITEMS = 12, 40, 5   # longest title, item text in a prompt; a word of fewer items identifies one: masked from rewards
LONGEST_LINE, LONGEST_WORD = 1 << 20, 60                   # of a file, of an item's text; characters
UNPACKED, RATIO, MAX_DOWNLOAD = 100 << 20, 200, 8 << 30    # most that a .gz file unpacks to, whatever its size; most times its size; bytes
ID = re.compile(r"[^\0-\x1f\x7f-\x9f\ud800-\udfff\ufffd]{1,200}")
MARKUP = re.compile(r"<[^<>]*>|[<>\uff1c\uff1e\ufe64\ufe65\0-\x1f\x7f-\x9f\ud800-\udfff]"         # tags, and the control tokens
                    r"|\[(?=/?(?:INST|CLS|SEP|PAD|UNK|[gs]?MASK|[A-Z]+_[A-Z_]+)\])")              # of chat templates and encoders
STOPWORDS = frozenset(  # the last line: of all reasons; sizes
    "a about above all also an and any are as at be been by can de for from has have how in into is it its la le me more most new no none not of off on one or "
    "other our out over per so than that the their them these they this to too two up use used very was we what when which who will with you your "
    "people choose count fl fluid inch inches ml ounce ounces oz pack pcs set size value".split())
words = lambda text: re.findall(r"[a-z0-9][a-z0-9'-]*", text.lower())
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

    counts = cached_property(lambda self: np.bincount(np.concatenate(self.train), minlength=self.n_items + 1))      # train choices, (n_items + 1,)
    document_frequency = cached_property(lambda self: Counter(w for item in self.items[1:] for w in set(words(item_text(item)))))
    common_words = cached_property(lambda self: {w for w, n in self.document_frequency.items() if n > self.n_items / 2} | STOPWORDS)

    @cached_property
    def events(self):
        """Train choices that have a history: dict of (E,) arrays user, pos, item, time, sorted by time (stable)."""
        rows = [(u, p, s[p], t[p]) for u, (s, t) in enumerate(zip(self.train, self.times)) for p in range(1, len(s))]
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        return dict(zip(("user", "pos", "item", "time"), table[np.argsort(table[:, 3], kind="stable")].T))

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
    def masked_words(self):
        """Words that tell which item it is (in fewer than MIN_ITEMS items, brands): never shown to the reward's encoder."""
        branded = Counter(w for item in self.items[1:] for w in set(words(item["brand"])))
        return {w for w, n in self.document_frequency.items() if n < MIN_ITEMS or branded[w] > n / 2}

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
        when, chosen = np.sort(rng.integers(0, span, rng.integers(9, 14))), []
        for t in when:
            matches = drives[half := int(t > span // 2)][:, needs[half]].sum(1)
            utility = 4 * matches + 2 * (matches == 2) + popularity + rng.gumbel(size=n_items)
            utility[chosen] = -np.inf
            chosen.append(int(utility.argmax()))
        seqs.append(np.array(chosen) + 1), times.append(when + 1_400_000_000)
    texts = [{"title": " ".join(ASPECTS[a] for a in s), "brand": BRANDS[rng.integers(len(BRANDS))]} for s in said]
    names = [[()] + [tuple(ASPECTS[a] for a in d) for d in drivers] for drivers in (early, late)]
    return Dataset("demo", [{}] + [record(f"D{i:04d}", r) for i, r in enumerate(texts, 1)], [f"user{u}" for u in range(n_users)], seqs, times,
                   truth={"early": names[0], "late": names[1], "since": [span // 2 + 1_400_000_000] * (n_items + 1)})

# --------------------------------------------------------------------------------------------------- real data sets
def load(name: str, data_dir: str = "data", *, seed=0, ties="file", k_core=-1, limit_items=0, limit_users=0, small=False) -> Dataset:
    """`demo`, an Amazon category (its 2014 or 2018 files, found in data_dir or downloaded there) or a folder's path. DataError says what to do.
    ties: "file" keeps the source's order within a timestamp, "shuffle" draws it by seed. k_core: -1 = 5 for a folder, else 0; limits: 0 = off."""
    if name == "demo":
        return demo(seed, *(200, 120) if small else (1000, 500))
    if os.path.isdir(name):
        rows, records, notes = read_folder(name)
        k_core = 5 if k_core < 0 else k_core
    else:
        rows, records, notes = read_amazon(name, data_dir)
    if ties == "shuffle":
        rows = [rows[i] for i in np.random.default_rng([seed, 11]).permutation(len(rows))]
    rows.sort(key=lambda r: r[2])                                              # list.sort is stable
    first = {r[:2]: r for r in reversed(rows)}
    notes += counted((len(rows) - len(first), "repeated user-item pairs: the first is kept"))
    rows = core([r for r in rows if r is first[r[:2]]], k_core)
    notes += counted((len(first) - len(rows), f"interactions outside the {k_core}-core: left out"))
    if limit_items:                                # rows are chronological: a user's last two are valid and test
        train = Counter(r[1] for mine in by_user(rows).values() for r in mine[:-2])
        keep = set(sorted({r[1] for r in rows}, key=lambda i: (-train[i], i))[:limit_items])
        rows = core([r for r in rows if r[1] in keep], 5)
    if limit_users:
        keep = set(np.random.default_rng([seed, 13]).permutation(sorted({r[0] for r in rows}))[:limit_users].tolist())
        rows = [r for r in rows if r[0] in keep]
    return from_rows(os.path.basename(os.path.normpath(name)), rows, records, notes)

identity = lambda value: (ID.fullmatch(str(value).strip() if type(value) in (str, int) else "") or [""])[0]          # an id as text, "" if it is none
counted = lambda *found: [f"{n} {what}" for n, what in found if n]                                 # notes from (number, what it counts)
by_user = lambda rows: {u: [*mine] for u, mine in groupby(sorted(rows, key=lambda r: r[0]), lambda r: r[0])}

def core(rows: list, k: int) -> list:
    """The k-core: every user and every item left has at least k interactions."""
    before = None
    while k > 1 and len(rows) != before:
        users, items, before = Counter(r[0] for r in rows), Counter(r[1] for r in rows), len(rows)
        rows = [r for r in rows if users[r[0]] >= k and items[r[1]] >= k]
    return rows

def from_rows(name, rows, records, notes) -> Dataset:
    """rows: (user id, item id, time, rating or None), sorted by time; records: item id -> record."""
    everyone = by_user(rows)
    people = {u: mine for u, mine in everyone.items() if len(mine) >= 3}
    notes += counted((len(everyone) - len(people), "users with fewer than 3 interactions: left out"))
    if not people:
        raise DataError("; ".join([f"{name}: no user has 3 interactions left; lower --k-core or the limits, or check the files", *notes]))
    number = {x: i for i, x in enumerate(sorted({r[1] for mine in people.values() for r in mine}), 1)}
    items, given = [{}] + [record(x, records.get(x, {})) for x in number], {r[3] for mine in people.values() for r in mine}
    take, rated = lambda column, as_=lambda x: x: [np.array([as_(r[column]) for r in mine]) for mine in people.values()], given <= {1, 2, 3, 4, 5}
    notes += counted((sum(item["id"] in records and not item["title"] for item in items[1:]), "items without a title"),
                     (sum("\ufffd" in str(item) for item in items), "items with bytes that are no UTF-8: shown as \ufffd"))
    notes += ["not every rating is 1, 2, 3, 4 or 5: ratings are left out"] * (not rated and given != {None})
    return Dataset(name, items, [*people], take(1, number.get), take(2), take(3) if rated else None, notes=notes)

def clean(value) -> str:
    """One line of plain text of a text, a number or a list of them: entities unescaped; markup, control tokens and characters dropped; words cut
    at LONGEST_WORD (one could be a million tokens); 'None' and 'nan' read as empty."""
    parts = value if isinstance(value, list) else [value]
    text = html.unescape(html.unescape(" ".join(str(v) for v in parts if type(v) in (str, int, float))))
    text = " ".join(word[:LONGEST_WORD] for word in MARKUP.sub(" ", text).split())
    return "" if text.lower() in ("nan", "none", "null") else text

def record(id, r: dict) -> dict:
    """An item from any source's fields; Amazon's categories are a list of paths in 2014, one path in 2018."""
    path = r.get("categories") or r.get("category")
    path = [path] if not isinstance(path, list) else path[0] if path and isinstance(path[0], list) else path
    return {"id": str(id), **{k: clean(r.get(k)) for k in ("title", "brand", "description")}, "categories": [c for c in map(clean, path) if c]}

def lines(path: str):
    """(number, text) of each line that is not blank of a text or gzip file, lazily, with progress; U+FFFD for bytes that are no UTF-8.
    DataError names the line that could not be read: broken or no gzip file, longer than LONGEST_LINE, a decompression bomb."""
    n, unpacked, packed = 0, 0, path.removesuffix(".part").endswith(".gz")
    try:
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig", errors="replace") as f:
            most, texts = max(UNPACKED, RATIO * os.path.getsize(path)), iter(lambda: f.readline(LONGEST_LINE + 1), "")
            for text in tqdm(texts, "reading " + os.path.basename(path), unit=" lines", leave=False, disable=None, delay=1):
                unpacked += len(text)
                if len(text) > LONGEST_LINE:
                    raise OSError(f"longer than {LONGEST_LINE:,} characters")
                if packed and unpacked > most:
                    raise OSError(f"unpacks to more than {RATIO} times its size, like a decompression bomb")
                n += 1
                if not text.isspace():
                    yield n, text
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path} line {n + 1}: cannot be read ({e}); mend the line, or delete the file and copy or download it again") from e

def parse_line(line: str) -> dict | None:
    """A JSON object or, in Amazon 2014 meta files, a Python dict literal (literal_eval runs no code) of JSON values alone."""
    for parse in (json.loads, lambda line: json.loads(json.dumps(ast.literal_eval(line)))):
        try:
            return value if isinstance(value := parse(line), dict) else None
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue

def interactions(path: str, found, parse, columns: str, advice: str):
    """Rows (user, item, time, rating or None) of the lines found, which parse makes dicts of, and a note of what was skipped."""
    (user, item, when, rating), rows, bad, late, first = columns.split(), [], 0, 0, 0
    known = lru_cache(None, typed=True)(identity)              # each id checked once and kept once
    for n, line in found:
        try:
            r = parse(line)
            who, what, time, given = known(r[user]), known(r[item]), float(r[when]), r.get(rating)
            late += 1e11 < time < 1e15
            if not (who and what and -62_135_596_800 <= time < 253_402_300_800):                               # the years 1 to 9999
                raise ValueError
            stars = None if given in (None, "") else float(given) if re.fullmatch(r"[1-5](\.0*)?", str(given)) else np.nan
            rows.append((who, what, int(time), stars))
        except (csv.Error, KeyError, TypeError, ValueError, OverflowError):
            bad, first = bad + 1, first or n
    where, needed = f" (the first: line {first})" * (bad > 0), f"{user}, {item} and a readable {when}"
    if not rows:
        raise DataError(f"{path}: no line{where} has {needed}; " + ("are they milliseconds? divide them by 1000" if late == bad > 0 else advice))
    return rows, counted((bad, f"lines of {os.path.basename(path)}{where} without {needed}: skipped"))

def catalogue(path: str, key: str, rows: list, notes: list) -> dict:
    """{item id: record} of the items of rows; notes on the others. key: "id" in a folder's file, all of whose lines must be good, else "asin"."""
    chosen, records, skipped, asin = {r[1] for r in rows}, {}, Counter(), re.compile(r"""['"]asin['"]\s*:\s*['"]([^'"]*)['"]""")
    for n, line in lines(path):
        if key == "id" or (named := asin.search(line)) and named[1].strip() in chosen:          # cheap test first: Amazon has ten times the items
            id = identity((r := parse_line(line) or {}).get(key))
            if not id and key == "id":
                raise DataError(f"{path} line {n}: not a JSON object with an id; mend or remove the line")
            skip = ("lines of {} that cannot be read: skipped" if not id else "items of {} that nobody chose: left out" if id not in chosen
                    else "items described twice in {}: the first is kept" if id in records else "")
            skipped[skip] += 1
            if not skip:
                records[id] = {k: r.get(k) for k in ("title", "brand", "description", "categories", "category")}
    if not records:
        raise DataError(f"{path}: describes none of the {len(chosen)} items chosen; is it the right file, with the same ids?")
    skipped["items are not in {}: they have no text"] = len(chosen) - len(records)
    notes += counted(*((n, what.format(os.path.basename(path))) for what, n in skipped.items() if what))
    return records

def amazon_files(name: str, data_dir: str):
    """Paths of reviews and items, of the 2018 files if only they are there, else of those of 2014; {path: address} of what is not there."""
    if not re.fullmatch(r"[A-Za-z0-9_]+", category := ALIASES.get(name.lower(), name)):
        raise DataError(f"{name}: no such folder; it needs interactions.csv and items.jsonl")
    pairs = [{os.path.join(data_dir, os.path.basename(url).format(category)): url.format(category) for url in urls} for urls in URLS]
    pair = next((pair for pair in pairs if os.path.exists([*pair][0])), pairs[0])
    return [*pair], {path: url for path, url in pair.items() if not os.path.exists(path)}

def read_amazon(category: str, data_dir: str):
    """Rows, item records and notes of an Amazon category, 2014 or 2018 files; downloads the 2014 pair if neither is there."""
    (reviews, meta), absent = amazon_files(category, data_dir)
    download(category, absent, data_dir)
    rows, notes = interactions(reviews, lines(reviews), parse_line, "reviewerID asin unixReviewTime overall", "is it the 5-core review file?")
    return rows, catalogue(meta, "asin", rows, notes), notes

def read_folder(folder: str):
    """The same of a folder: interactions.csv (user,item,timestamp[,rating]; an open quote ends with its line), items.jsonl (id,title[,brand,...])."""
    path, described = (os.path.join(folder, name) for name in ("interactions.csv", "items.jsonl"))
    if missing := [name for name in (path, described) if not os.path.exists(name)]:
        raise DataError(f"{missing[0]} is missing; needed are interactions.csv (user,item,timestamp[,rating]) and items.jsonl (id,title[,brand,...])")
    n, header = next(found := lines(path), (1, ""))
    names = [name.strip(' "\n') for name in header.split(",")]
    if [*map(names.count, ("user", "item", "timestamp"))] != [1, 1, 1] or names.count("rating") > 1:
        raise DataError(f"{path} line {n}: the first line must name the columns user,item,timestamp[,rating] once each, with commas, in UTF-8")
    parse = lambda line: dict(zip(names, map(str.strip, next(csv.reader([line], strict=True, skipinitialspace=True))), strict=True))
    rows, notes = interactions(path, found, parse, "user item timestamp rating", "it must be a number, seconds since 1970")
    return rows, catalogue(described, "id", rows, notes), notes

def download(category: str, wanted: dict, data_dir: str):
    """Fetches missing files, {path: https address}: progress bar, .part file, size, all `lines` to the checksum at the end, then an atomic rename."""
    for path, url in wanted.items():
        part = path + ".part"
        try:
            with urllib.request.urlopen(url, timeout=20) as source, (os.makedirs(data_dir, exist_ok=True) or open(part, "wb")) as out:
                size = int(source.headers.get("Content-Length") or 0)
                if not source.url.startswith("https://"):
                    raise OSError(f"it leads to {source.url}, which is not https")
                with tqdm(total=size or None, unit="B", unit_scale=True, desc=f"downloading {os.path.basename(path)}", disable=None) as bar:
                    while chunk := source.read(1 << 20):
                        if max(size, out.tell() + len(chunk)) > MAX_DOWNLOAD:
                            raise OSError(f"more than {MAX_DOWNLOAD:,} bytes")
                        bar.update(out.write(chunk))
                if size not in (0, out.tell()):
                    raise OSError(f"{out.tell()} of {size} bytes came")
            sum(1 for _ in lines(part))
            os.replace(part, path)
        except (OSError, ValueError, http.client.HTTPException) as e:          # URLError is an OSError, DataError a ValueError
            files = "\n".join(f"  {os.path.basename(p)}  from  {u}" for p, u in wanted.items())
            raise DataError(f"data set '{category}' is not in {os.path.abspath(data_dir)} and could not be downloaded ({e}).\n"
                            f"Put there by hand:\n{files}\nor name their folder with --data-dir. `--dataset demo` needs no files.") from e
        finally:                                   # broken or refused; what Ctrl-C leaves, the next download overwrites
            if os.path.exists(part):
                os.remove(part)

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
    content, said = [w for w in words(reason) if w not in STOPWORDS], set(words(item_text(data.items[item])))
    return sum(w in said for w in content) / len(content) if content else 0.0

def mask_identity(data: Dataset, text: str) -> str:
    """The words of a text, sorted, without brands, numbers, common ones and those only a few items have: what the reward's encoder reads."""
    return " ".join(sorted(w for w in words(text) if w not in data.masked_words and w not in data.common_words and not w[0].isdigit())) or "item"

def random_reason(data: Dataset, item: int, rng, size: int = 2) -> str:
    """A grounded reason that names phrases of the item drawn at random (weak supervision knows no better)."""
    own = data.phrases[item]
    return "people choose it for " + " and ".join([own[i] for i in sorted(rng.permutation(len(own))[:size])] or ["itself"])

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
    for _ in range(n if nameable or len(events["user"]) else 0):
        if nameable and (not len(events["user"]) or rng.random() < reason_share):
            item = int(nameable[rng.integers(len(nameable))])
            shown = rng.permutation(who[item])[: rng.integers(people + 1)]     # fewer people: shorter, easier
            out.append(reason_sample(data, item, shown, rng, random_reason(data, item, rng) if rng.random() < 0.5 else "", follow))
            continue
        choice = (choices := choices or rng.permutation(len(events["user"])).tolist()).pop()
        user, end = int(events["user"][choice]), int(events["pos"][choice])
        s, task = data.train[user], "next" if rng.random() < next_share else tasks[rng.integers(len(tasks))]
        past, goal = [data.titles[i] for i in s[max(0, end - longest): end]], data.titles[s[end]]          # s[end] is the choice to be told
        others = [j for j in dict.fromkeys(rng.integers(1, data.n_items + 1, 8).tolist()) if j not in s][:2]
        shown, about = "; ".join(past), ()
        if task in ("mim", "mlm"):         # blank an item of the history, or a word of its titles
            parts, gap = (past, "; ") if task == "mim" else (shown.split(), " ")
            hide = int(rng.integers(len(parts)))
            shown, answer = gap.join([*parts[:hide], "____", *parts[hide + 1:]] + [goal] * (task == "mim")), parts[hide].strip(";") or ";"
        elif task in ("bpr", "rank") and others:
            some = [s[end], *others[: 1 if task == "bpr" else None]]
            about, answer = ["; ".join(data.titles[j] for j in rng.permutation(some))], goal
        elif task == "rate":
            about, answer = [goal], f"{data.ratings[user][end]:.0f}"
        else:
            task, answer = "next", "\n".join(data.titles[i] for i in s[end: end + ahead])
        out.append((f"Chosen in order: {shown}\n{TASKS[task].format(*about)}", answer))
    return out

def parse_preferences(text: str) -> list:
    """The PREFERENCES different names in an answer's JSON object; [] if it is malformed or has another number."""
    found = re.search(r"\{[^{}]*\}", text[:10_000]) or [""]
    names = (parse_line(found[0]) or {}).get("preferences")
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
