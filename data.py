"""Images and their captions, from three places, as one kind of dataset.

    open_data("sunsets")           50,000 small landscapes, rendered here: nothing to download
    open_data("photos/")           a folder of images, nested or flat
    open_data("fashion-mnist/")    IDX files, gzipped or not, or the path of one of them

Each item is (uint8 tensor [3, size, size], caption str). A folder is read image by image and may
be larger than memory. In a sunset the sun *causes* the rest: the sky, the lit side of every cloud,
the haze on the hills and the glitter on the sea. So there is a best thing to draw first.

Where there is no test split, a hash of the file names holds a tenth back: copies of an image under
two names may land on both sides. Each .pt file carries a fingerprint of its data: for a folder, of
the names, sizes and captions of its images.

    python data.py          about 3 seconds: describes the data, writes out/data.png (24 images)

The second half is the toolbox of all scripts. Not here: augmentation, downloads, training.
"""
import argparse
import atexit
import contextlib
import csv
import ctypes
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import posixpath
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from torch.nn.functional import pad
from tqdm import tqdm

ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Files beside the images that nobody expects to be read as images.
NO_IMAGES = (".txt", ".csv", ".tsv", ".jsonl", ".json", ".xml", ".md", ".ini", ".db")
# Never EPS: reading it starts a program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
VERSION = 2             # of the .pt files
SAVE_EVERY = 30         # seconds between two saves of an unfinished run
MEASURED = 5            # seconds of work from which a bar tells how long the rest takes
TOO_LARGE = "error: out of memory: try a smaller --batch, smaller images or a smaller model"

# Pillow refuses twice as much, unread: a photo of 48 megapixels passes, larger ones are skipped.
Image.MAX_IMAGE_PIXELS = 25_000_000
# Remarks of Pillow on odd files would look like errors of ours.
warnings.filterwarnings("ignore", module="PIL")


# ------------------------------------------------------------------------------------------------
# 1. Datasets


def open_data(path="sunsets", size=32, split="train"):
    """Dataset of (uint8 [3, size, size], caption str): "sunsets", a folder, or IDX files.

    split           "train" or "test"
    .captions       of all its images
    .skipped        a line for each file that cannot be read
    .native         usual (width, height) of the files, None if any size is native
    .fingerprint    the same for both splits and all sizes
    """
    path = os.fspath(path)
    if split not in ("train", "test"):
        raise UserError(f"split {printable(split)}: expected train or test")
    if size not in range(1, 4097):
        raise UserError(f"size {printable(size)}: expected a whole number from 1 to 4096")
    if path == "sunsets":
        return Sunsets(size, split)
    if os.path.isfile(path) or os.path.isdir(path) and idx_files(path):
        return Idx(path, size, split)
    if os.path.isdir(path):
        return Folder(path, size, split)
    raise UserError(f"{printable(path) or 'no path'} does not exist: "
                    "--data takes a folder of images, an IDX file, or sunsets")


def describe(dataset):
    """Prints what there is, what was skipped, and how it is split."""
    captions = set(dataset.captions)
    words = {word for caption in captions for word in words_of(caption)}
    print(f"{dataset.name} ({dataset.split}): {len(dataset):,} images, "
          f"{len(captions - {''}):,} captions, {len(words):,} distinct words")
    if dataset.skipped:
        print(f"skipped {len(dataset.skipped):,} unreadable: " + ", ".join(dataset.skipped[:10]))
    # The rest is true of both splits: once is enough.
    if dataset.split == "test":
        return
    for line in dataset.notes:
        print(line)
    if dataset.native not in (None, (dataset.size, dataset.size)):
        width, height = dataset.native
        print(f"your images are about {width}x{height}: "
              f"the centre square is resized to {dataset.size}x{dataset.size}")


class Folder(torch.utils.data.Dataset):
    """One split of a folder of images.

    The caption of an image is its first row in metadata.csv or metadata.jsonl, else the first line
    of the .txt beside it, else the name of its folder, else empty.
    """

    def __init__(self, path, size, split):
        self.name = printable(path)
        self.root = path
        self.size = size
        # A photo takes 10 ms or more to decode: 256 MB of small images are kept.
        self.read = functools.lru_cache(2 ** 28 // (3 * size * size))(self.read_file)
        self.split = split
        files, self.locked = list_files(path)
        names = sorted(name for name in files if ending(name) in ENDINGS)
        others = Counter(ending(name) or "without ending" for name in files
                         if ending(name) not in ENDINGS + NO_IMAGES)
        kinds = ", ".join(f"{n:,} {what}" for what, n in others.most_common())
        if not names:
            raise UserError(f"{self.name} has no images, only {kinds or 'text or nothing'}: "
                            f"expected files that end in {' '.join(ENDINGS)}")
        roles = split_folders(names)
        metadata = read_metadata(path, files)
        self.all_captions = {name: caption_of(path, name, metadata, roles) for name in names}
        self.fingerprint = fingerprint("folder", [
            (os.fsencode(name), bytes_of(os.path.join(path, name)), caption)
            for name, caption in self.all_captions.items()])
        self.mine = [name for name in names if split_of(name, roles) == split]
        self.notes = []
        nameless = len(metadata.keys() - self.all_captions.keys())
        if nameless:
            self.notes.append(f"{nameless:,} rows of metadata name no image here")
        if roles:
            sides = [f"{top or '.'}/ -> {role}" for top, role in roles.items()]
            self.notes.append("split: " + ", ".join(sides))
        if others:
            self.notes.append(f"{others.total():,} files not read: {kinds}")

    def problem(self, name):
        """Why an image cannot be read, in a few words; "" if it can."""
        try:
            self.read(name)
        # Decoders raise nearly everything: OSError, SyntaxError, struct.error, KeyError ...
        except Exception as error:
            return printable(str(error).split(" '")[0] or type(error).__name__)[:80]
        return ""

    @functools.cached_property
    def checked(self):
        """([readable images], [a line for each skipped file]).

        Decodes every image once: a broken file must not stop a run that began hours ago.
        """
        good = []
        bad = list(self.locked)
        bar = progress(len(self.mine), "checking images", "img")
        with bar, ThreadPool(4) as pool:
            for name, problem in zip(self.mine, pool.imap(self.problem, self.mine)):
                bar.update()
                if problem:
                    bad.append(f"{printable(name)} ({problem})")
                else:
                    good.append(name)
        if self.split == "train" and not good:
            why = bad[0] if bad else "all are held out for testing"
            raise UserError(f"{self.name}: none of {len(self.all_captions):,} images can be "
                            f"trained on, {why}: add more images")
        return good, bad

    @functools.cached_property
    def native(self):
        """(width, height): medians over up to 100 files, of which only the headers are read."""
        names = self.checked[0]
        sizes = []
        for name in names[::len(names) // 100 + 1]:
            with Image.open(os.path.join(self.root, name), formats=FORMATS) as image:
                sizes.append(image.size)
        return tuple(round(statistics.median(side)) for side in zip(*sizes)) or None

    @property
    def skipped(self):
        return self.checked[1]

    @property
    def captions(self):
        return [self.all_captions[name] for name in self.checked[0]]

    def __len__(self):
        return len(self.checked[0])

    def read_file(self, name):
        return read_image(os.path.join(self.root, name), self.size)

    def __getitem__(self, i):
        name = self.checked[0][i]
        return self.read(name), self.all_captions[name]


def in_test_split(name):
    """Whether a hash puts this name (relative, with /) into the test split: a tenth of all."""
    return int(hashlib.sha256(os.fsencode(name)).hexdigest(), 16) % 10 == 0


SPLITS = {"train", "test", "val", "valid", "validation"}
HASHED = "a tenth is held out"


def top_folder(name):
    """The first folder of a relative name, in lower case: "train" of "Train/cats/1.png"."""
    return posixpath.dirname(name).split("/")[0].lower()


def split_folders(names):
    """{first folder: "train", "test", "left out" or HASHED}; {} if they are classes, no splits.

    test/ is the test split, or val/ where there is no test/. A train/ is all that is trained on,
    else what is in neither. A lone train/ among other folders is a class: pictures of trains.
    """
    tops = {top_folder(name) for name in names}
    tests = tops & {"test"} or tops & SPLITS - {"train"}
    trains = tops & {"train"} or tops - SPLITS
    if tests and trains:
        roles = dict.fromkeys(sorted(tops), "left out")
        return roles | dict.fromkeys(trains, "train") | dict.fromkeys(tests, "test")
    return dict.fromkeys(sorted(tops), HASHED) if tops <= SPLITS else {}


def split_of(name, roles):
    """One of "train", "test", "left out": by the folder, else by the hash of the name."""
    role = roles.get(top_folder(name), HASHED)
    if role == HASHED:
        return "test" if in_test_split(name) else "train"
    return role


def caption_of(root, name, metadata, roles):
    """The caption of an image: see Folder."""
    if name in metadata:
        return metadata[name]
    beside = os.path.join(root, posixpath.splitext(name)[0] + ".txt")
    if os.path.isfile(beside):
        with open_text(beside) as file:
            return next(filter(None, map(one_line, file)), "")
    folders = name.split("/")[:-1]
    if top_folder(name) in SPLITS & roles.keys():
        folders = folders[1:]
    # 00000/, 00001/ ... are shards of a large folder and say nothing about the image.
    folders = [folder for folder in folders if not re.fullmatch(r"\d{5,}", folder)]
    return one_line(folders[-1]) if folders else ""


def read_metadata(root, files):
    """{image: its first caption} of all metadata.csv and metadata.jsonl."""
    captions = {}
    for name in sorted(files):
        folder, base = posixpath.split(name)
        if base not in ("metadata.csv", "metadata.jsonl"):
            continue
        path = os.path.join(root, name)
        try:
            with open_text(path) as file:
                rows = csv.DictReader(file, strict=True, skipinitialspace=True)
                if base.endswith("l"):
                    rows = (json.loads(line) for line in file if line.strip())
                for row in rows:
                    # csv puts what is beyond the columns under None.
                    if None in row:
                        raise ValueError(f"too many columns: {row}")
                    # Names are relative to the file that names them.
                    image = posixpath.join(folder, str(row["file_name"]).replace("\\", "/"))
                    text = one_line(str(row["text"] or ""))
                    captions.setdefault(posixpath.normpath(image), text)
        except KeyError:
            raise UserError(f"{printable(path)} has {printable(', '.join(row))[:200]}: expected "
                            "file_name and text") from None
        except (csv.Error, TypeError, ValueError) as error:
            raise UserError(f"{printable(path)} cannot be read ({printable(error)[:200]}): expected"
                            ' file_name and text in each row, and quotes: "red, with a comma"'
                            ) from None
    return captions


class Idx(torch.utils.data.Dataset):
    """One split of IDX files. The t10k (or test) files are the test split, else a tenth is."""
    skipped = ()
    notes = ()
    FASHION = "tshirt trouser pullover dress coat sandal shirt sneaker bag boot".split()

    def __init__(self, path, size, split):
        self.name = printable(path)
        self.size = size
        self.split = split
        files = idx_files(path)
        # The first megabyte will do.
        self.fingerprint = fingerprint("idx", [
            (key, os.path.getsize(file), np.fromfile(file, np.uint8, 2 ** 20).tobytes())
            for key, file in sorted(files.items())])
        own_test = ("test", "images") in files
        part = "test" if own_test and split == "test" else "train"
        if (part, "images") not in files:
            raise UserError(f"{self.name} has no train-images-idx3-ubyte")
        self.images = read_idx(files[part, "images"], 3)
        _, height, width = self.images.shape
        self.native = (width, height)
        self.rows = [i for i in range(len(self.images))
                     if own_test or in_test_split(str(i)) == (split == "test")]
        self.captions = [""] * len(self.rows)
        if (part, "labels") not in files:
            return
        labels = read_idx(files[part, "labels"], 1)
        if len(labels) != len(self.images):
            raise UserError(f"{self.name} has {len(self.images)} images but {len(labels)} "
                            "labels: fetch both again")
        words = [str(label) for label in range(256)]
        folder = Path(files[part, "labels"]).absolute().parent
        # torchvision puts the files into FashionMNIST/raw.
        if "fashion" in (folder.parent if folder.name == "raw" else folder).name.lower():
            words[:10] = self.FASHION
        self.captions = [words[labels[i]] for i in self.rows]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        image = Image.fromarray(self.images[self.rows[i]])
        image = torch.from_numpy(np.array(square(image, self.size)))
        return image.expand(3, -1, -1).contiguous(), self.captions[i]


# ------------------------------------------------------------------------------------------------
# Sunsets

SUNSETS = 50_000
SUNSETS_TRAIN = 45_000
# Raise it when the renderer changes: the fingerprint then tells old tokens from new ones.
SUNSETS_VERSION = 1
SUNSET_LABELS = ("sky", "sun", "cloud", "hills", "sea", "reflection")
# Sun, its rim, sky at the horizon, half way up, at the top, lit side of a cloud, its shaded side.
PALETTES = {
    "white": "fffdf2 fff6d8 f5ead2 a9c7da 5187bd fffdf6 93a9c4",
    "yellow": "fff9b0 ffe02e ffe0a0 a9bcc0 3c6ea8 fff2a8 8791a6",
    "orange": "ffdc8c ff9a1c ffb968 d08c7c 484c8e ffc070 7d6088",
    "red": "ff8c5a ff2c1c f58052 a84660 34285a ff7a52 5c3260",
    "pink": "ffd2e6 ff62aa ffc2b4 bd8cc0 5459a6 ffa8ce 7d629e",
}
PLACES = {"on the left": 0.24, "in the middle": 0.5, "on the right": 0.76}
COUNTS = ("no clouds", "one cloud", "two clouds", "three clouds")
# All kinds of landscape. The first number is that of the ranges of hills.
KINDS = list(itertools.product(range(3), COUNTS, PLACES, ("high", "low"), PALETTES))
# Of a cloud: x, y, radius in units of its width.
PUFFS = ((-0.75, 0.0, 0.32), (-0.35, -0.2, 0.42), (0.15, -0.36, 0.48),
         (0.55, -0.1, 0.40), (0.9, 0.05, 0.25), (0.0, 0.0, 0.5))


class Sunsets(torch.utils.data.Dataset):
    """The built-in landscapes. The first 45,000 are the train split, the others the test split."""
    name = "sunsets"
    skipped = ()
    native = None

    def __init__(self, size, split):
        self.size = size
        self.split = split
        self.fingerprint = fingerprint("sunsets", SUNSETS_VERSION)
        self.rows = range(SUNSETS_TRAIN)
        if split == "test":
            self.rows = range(SUNSETS_TRAIN, SUNSETS)
        self.captions = [sunset_caption(i) for i in self.rows]
        self.notes = []
        if os.path.isdir("sunsets"):
            self.notes = ["these are the built-in sunsets: for your folder write --data ./sunsets"]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return render_sunset(self.rows[i], self.size)[:2]


def sunset_kind(index):
    """(ranges of hills, clouds, place, "high" or "low", colour) of the sun.

    A checksum of the index chooses, so 50,000 captions cost milliseconds and no picture.
    """
    return KINDS[zlib.crc32(str(index).encode()) % len(KINDS)]


def sunset_caption(index):
    """Such as "low red sun on the left two clouds"."""
    _, clouds, place, height, colour = sunset_kind(index)
    return f"{height} {colour} sun {place} {clouds}"


def sunset_scene(index):
    """All that is random about landscape `index`, in units of the picture's side."""
    s = SimpleNamespace()
    ranges, clouds, place, height, colour = sunset_kind(index)
    s.low = height == "low"
    # One call to numpy costs more than its numbers.
    draw = iter(np.random.default_rng(index).random(128).tolist())

    def between(a, b):
        return a + (b - a) * next(draw)

    # of the horizon
    s.line = between(0.60, 0.68)
    s.radius = between(0.09, 0.11)
    s.sun_x = PLACES[place] + between(-0.06, 0.06)
    s.sun_y = s.line - s.radius * between(0.15, 0.75) if s.low else between(0.16, 0.25)
    spots = [(x, y) for x in (0.17, 0.5, 0.83) for y in (0.14, 0.28, 0.42)]
    spots = [spot for spot in spots if math.dist(spot, (s.sun_x, s.sun_y)) > 0.22]
    s.clouds = []
    for _ in range(COUNTS.index(clouds)):
        x, y = spots.pop(int(next(draw) * len(spots)))
        spots = [spot for spot in spots if math.dist(spot, (x, y)) > 0.2] or spots
        flip = 1 if next(draw) < 0.5 else -1
        puffs = [(flip * u + between(-0.1, 0.1), v + between(-0.08, 0.08), r * between(0.85, 1.1))
                 for u, v, r in PUFFS]
        s.clouds.append((x + between(-0.08, 0.08), y + between(-0.03, 0.03),
                         between(0.13, 0.19), puffs))
    s.hills = [[(between(-0.1, 1.1), between(0.10, 0.26), between(0.03, 0.11)) for _ in range(3)]
               for _ in range(ranges)]
    s.waves = [between(0, 2 * math.pi) for _ in range(4)]
    colours = np.frombuffer(bytes.fromhex(PALETTES[colour]), np.uint8).astype(np.float32)
    s.core, s.rim, s.horizon, s.middle, s.top, s.lit, s.shade = colours.reshape(7, 3, 1, 1) / 255
    return s


def render_sunset(index, size=32):
    """Landscape `index` -> (uint8 [3, size, size], caption, labels uint8 [size, size]).

    Labels are indices into SUNSET_LABELS. The picture is the same at every size: its edges are
    ramps one pixel wide, computed exactly, which is what averaging would give.
    """
    s = sunset_scene(index)
    s.size = size
    s.x = ((np.arange(size, dtype=np.float32) + 0.5) / size)[None, :]  # [1, W]
    s.y = s.x.T  # [H, 1]
    s.picture = np.empty((3, size, size), np.float32)
    s.labels = np.zeros((size, size), np.uint8)
    paint_sky(s)
    paint_sun(s)
    for cloud in s.clouds:
        paint_cloud(s, *cloud)
    paint_hills(s)
    paint_sea(s)
    image = (s.picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return torch.from_numpy(image), sunset_caption(index), torch.from_numpy(s.labels)


# ------------------------------------------------------------------------------------------------
# 2. The toolbox of all scripts: dice and batches


def seeded(*key, device="cpu"):
    """A random generator that depends on `key` alone.

    Keyed by (seed, step), a resumed run repeats what an uninterrupted one would have drawn, and
    no state of a generator is on the disk.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def batch_of(step, batch, n, seed):
    """The `batch` indices below n of one step: random permutations of 0..n-1, cut into batches.

    A batch may be larger than n. With n=3, batch=2 the steps 0, 1, 2 see each image twice.
    """
    return [permutation(n, seed, k // n)[k % n] for k in range(step * batch, (step + 1) * batch)]


@functools.lru_cache(2)
def permutation(n, seed, epoch):
    """A random permutation of 0..n-1, a list: the same for the same n, seed and epoch."""
    return torch.randperm(n, generator=seeded(seed, "epoch", epoch)).tolist()


# ------------------------------------------------------------------------------------------------
# Unfinished runs


class Checkpoint:
    """An unfinished run on disk, for --resume.

    settings    a dict of plain values that a resumed run must share
    resume      whether to go on from the file at `path`, if it is there
    command     "python anyorder.py", for messages
    .state      what was saved last, with the best model so far; {} for a new run

    The first Ctrl-C finishes the step, saves and leaves. A second one leaves at once.
    """

    def __init__(self, path, settings, resume, command):
        self.path = path
        self.settings = settings
        self.state = {}
        self.saved = time.time()
        self.asked = math.inf
        if resume and os.path.exists(path):
            file = load(path, "unfinished", f"{command} without --resume")
            other = [key for key in settings if file["config"].get(key) != settings[key]]
            if other:
                raise UserError(f"{printable(path)} was begun with another {', '.join(other)}: "
                                "repeat its flags, or leave out --resume")
            self.state = file["state"]
            print(f"going on from {printable(path)}")
        signal.signal(signal.SIGINT, self.ask)

    def ask(self, *_):
        # torchrun passes Ctrl-C on to processes that have it already: that is no second one.
        if time.time() > self.asked + 1:
            raise KeyboardInterrupt
        self.asked = min(self.asked, time.time())

    def after_step(self, state, step):
        """Saves the dict state() now and then. After Ctrl-C it saves, then KeyboardInterrupt."""
        # Ctrl-C in any process: all must leave after the same step.
        stopped = any(in_turn([self.asked < math.inf]))
        if stopped or time.time() - self.saved > SAVE_EVERY:
            self.saved = time.time()
            if is_first():
                save(self.path, {"kind": "unfinished", "config": self.settings, "state": state()})
        if stopped:
            tqdm.write(f"stopped at step {step:,}: the same command with --resume goes on")
            raise KeyboardInterrupt

    def done(self):
        """The finished file is written: removes this one, and Ctrl-C is as usual again."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if is_first() and os.path.exists(self.path):
            os.remove(self.path)


# ------------------------------------------------------------------------------------------------
# Flags and errors


class UserError(Exception):
    """Bad input. The message is one line: the value, what was expected, what mends it."""


def run(main):
    """Calls `main()`. What a user can mend becomes one line on stderr and exit code 2.

    Ctrl-C gives 130. A closed pipe, or another process of the run that died, gives 1.
    """
    for stream in (sys.stdout, sys.stderr):
        # A caption must not crash a terminal that lacks its letters.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    keep_memory()
    code = 2
    try:
        main()
        sys.stdout.flush()
        return
    except UserError as error:
        message = f"error: {error}"
    except KeyboardInterrupt:
        message = "stopped" if is_first() else ""
        code = 130
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has gone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        message = ""
        code = 1
    except OSError as error:
        what = printable(error.filename or "writing")
        message = f"error: {what}: {printable(error.strerror or error)}"
    except MemoryError:
        message = TOO_LARGE
    except RuntimeError as error:
        message = TOO_LARGE
        if re.search("gloo|nccl", str(error).lower()):
            message = "error: another process of this run has died: its message tells why"
            code = 1
        # So says torch, of a GPU or of a CPU.
        elif not re.search("out of memory|allocate memory", str(error)):
            raise
    if message:
        # Below a progress bar, where there is one.
        tqdm.write(message, file=sys.stderr)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message):
        raise UserError(f"{printable(message)}: {self.prog} --help lists the flags")


def arguments(doc, flags=("data", "out", "seed", "device")):
    """A parser with the flags that mean the same in every script. `doc` is the script's."""
    parser = Parser(description=doc.strip().split("\n\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    known = {
        "data": dict(help="a folder of images, an IDX file, or sunsets; None takes the data of "
                          "--out, else sunsets"),
        "out": dict(default="out", help="the folder of all files that stages write and read"),
        "seed": dict(default=0, type=number(int, 0, 2 ** 63 - 1),
                     help="makes runs on a CPU repeatable"),
        "device": dict(default="", help="cpu, cuda or mps; empty takes the best there is"),
    }
    for flag in flags:
        parser.add_argument("--" + flag, **known[flag])
    return parser


def number(kind, least, most=math.inf):
    """An argparse type: number(int, 1) takes whole numbers of at least 1, and no others."""
    what = "a whole number" if kind is int else "a number"
    limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"

    def read(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if least <= value <= most and value < math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text} is not {what} {limits}")

    return read


def command_line(script, *flags):
    """What to type: command_line("a.py", "--out", "my out") == "python a.py --out 'my out'"."""
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return "python " + join([script, *map(str, flags)])


def printable(text):
    r"""`text` on one line, control characters escaped. printable("a\nb") == r"a\nb"."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode()
                   for c in str(text))


def one_line(text):
    """A caption without line breaks, control characters and broken unicode, and not too long."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(text.split())[:1000]


# Characters of Chinese and Japanese, and the skin tones of emoji
WORDS = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U0001f3fb-\U0001f3ff"
                   "\U00020000-\U0003ffff]")


def words_of(caption):
    """The words of a caption. words_of("T-shirt, red_2") == ["t", "shirt", "red", "2"].

    A combining mark belongs to its letter. Each CJK character and each emoji is a word.
    """
    text = ""
    for c in unicodedata.normalize("NFKC", caption).lower():
        # Letter, Number, Mark, Symbol (other) ...
        category = unicodedata.category(c)
        if category == "So" or WORDS.match(c):
            text += f" {c} "
        elif category[0] in "LN" or category[0] == "M" and text[-1:].strip():
            text += c
        else:
            text += " "
    return text.split()


# ------------------------------------------------------------------------------------------------
# Files, whole or not at all


@contextlib.contextmanager
def replacing(path):
    """`with replacing(path) as file:` write to `file`; when all is on the disk, it is `path`.

    A reader never sees half a file. A full disk is a UserError and leaves the old file.
    """
    path = str(path)
    # In the same folder, since a rename is atomic only within one disk. Each writer has its own.
    temporary = f"{path}.{os.urandom(4).hex()}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    # torch reports a full disk as RuntimeError.
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise UserError(f"{printable(path)} could not be written ({printable(reason)}): "
                        "make room or choose another --out") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def save(path, contents):
    """Writes a dict of plain tensors and built-in types, and VERSION, to a .pt file."""
    with replacing(path) as file:
        torch.save({**contents, "version": VERSION}, file)


def save_picture(path, picture):
    """Writes a PIL image to a .png file."""
    with replacing(path) as file:
        picture.save(file, "PNG")


def load(path, kind, made_by):
    """The dict that `save` wrote; UserError if it is not whole or not of this kind.

    Nothing in the file is executed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # testzip compares checksums and so finds a flipped bit. torch.load does not.
            if archive.testzip():
                raise ValueError
        contents = torch.load(path, weights_only=True, map_location="cpu")
        if (contents["kind"], contents["version"]) == (kind, VERSION):
            return contents
        problem = "was written by an older version"
        if contents["kind"] != kind:
            problem = f"holds {printable(contents['kind'])[:40]}, expected {kind}"
    except FileNotFoundError:
        problem = "does not exist"
    # A damaged archive fails in a hundred ways.
    except Exception:
        problem = "cannot be read, is damaged or not a .pt file of this project"
    raise UserError(f"{printable(path)} {problem}: run {made_by}")


def restore(make, file, path, made_by):
    """The network make(config) with the weights of a file that `load` has read."""
    try:
        network = make(file["config"])
        network.load_state_dict(file["model"])
        return network
    # A config may hold anything.
    except Exception:
        raise UserError(f"{printable(path)} is damaged, its config and weights do not fit: "
                        f"run {made_by}") from None


def writable(out):
    """Creates the folder `out`. UserError at once, not after hours, if that cannot be written."""
    try:
        os.makedirs(out, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"--out {printable(out)} cannot be written to "
                        f"({printable(error.strerror)}): choose another folder") from None


def fingerprint(*parts):
    """16 hex digits that name a content: str, bytes, numbers, None, tensors, lists, dicts."""
    digest = hashlib.sha256()

    def add(part):
        if isinstance(part, torch.Tensor):
            add(f"tensor {part.dtype} {tuple(part.shape)}")
            part = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if isinstance(part, dict):
            part = [(key, part[key]) for key in sorted(part, key=str)]
        if isinstance(part, (list, tuple)):
            digest.update(f"list {len(part)} ".encode())
            for item in part:
                add(item)
        else:
            raw = part
            if not isinstance(part, bytes):
                raw = repr(part).encode("utf-8", "surrogateescape")
            # Type and length keep ("ab", "c"), ("a", "bc") and ("a", b"bc") apart.
            digest.update(f"{type(part).__name__} {len(raw)} ".encode() + raw)

    add(parts)
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------
# Pictures, the loss curve, progress


def to_float(images):
    """uint8 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float in [-1, 1] -> uint8, rounded (truncating would darken every image) and clipped."""
    return (images.float().nan_to_num() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def sheet(images, columns, scale=1, gap=2):
    """A contact sheet, row by row on white: [n, 3, H, W] uint8 or float in [-1, 1] -> PIL image."""
    images = torch.stack(list(images)).cpu()
    if images.dtype != torch.uint8:
        images = to_uint8(images)
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    columns = min(len(images), columns)
    missing = -len(images) % columns
    # `gap` on the left and on top of each image, white images at the end
    images = pad(images, (gap, 0, gap, 0, 0, 0, 0, missing), value=255)
    page = images.unflatten(0, (-1, columns))  # [rows, columns, 3, H, W]
    page = page.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    page = pad(page, (0, gap, 0, gap), value=255)  # [3, rows * H, columns * W]
    return Image.fromarray(page.permute(1, 2, 0).contiguous().numpy())


def loss_curve(history, path, floor=None):
    """Draws (step, training loss, held-out loss) triples to a .png, and writes them to a .csv."""
    table = ["step,training,held_out\n"]
    table += [f"{step},{train:.6g},{held_out:.6g}\n" for step, train, held_out in history]
    with replacing(os.path.splitext(path)[0] + ".csv") as file:
        file.write("".join(table).encode())

    W, H, margin = 640, 360, 44
    picture = Image.new("RGB", (W, H), "white")
    pen = ImageDraw.Draw(picture)
    steps, train, held_out = zip(*history)
    losses = [*train, *held_out, floor or train[0]]
    low = min(losses)
    high = max(losses) + 1e-9

    def at(step, loss):
        x = margin + (W - margin - 12) * step / (steps[-1] or 1)
        return x, 12 + (H - margin - 12) * (high - loss) / (high - low)

    pen.line((margin, 12, margin, H - margin + 2, W - 12, H - margin + 2), fill="black")
    for loss in torch.linspace(low, high, 5).tolist():
        pen.text((4, at(0, loss)[1] - 6), f"{loss:.2f}", fill="black")
    legend = f"0 ... step {steps[-1]:,}      nats per token: grey training, red held out"
    if floor:
        legend += ", blue ln(V)"
        pen.line((at(0, floor), at(steps[-1], floor)), fill="blue")
    pen.text((margin, H - 30), legend, fill="black")
    pen.line(list(map(at, steps, train)), fill="silver", width=2)
    pen.line(list(map(at, steps, held_out)), fill="red", width=2)
    save_picture(path, picture)


def progress(total, title, unit, initial=0):
    """A tqdm bar that soon says how long all will take.

    Only the first process shows it, and a log file gets one line a minute.
    """
    how = dict(dynamic_ncols=True)
    if not sys.stderr.isatty():
        how = dict(file=LogFile(), mininterval=60, maxinterval=60, miniters=1, ncols=80)
    return Bar(total=total, desc=title, unit=unit, initial=initial, delay=1,
               disable=not is_first(), **how)


class Bar(tqdm):
    """After MEASURED seconds of work it says, on a line that stays, how long the rest takes."""
    told = False

    def update(self, n=1):
        super().update(n)
        if self.disable or self.told or time.time() - self.start_t < MEASURED:
            return
        self.told = True
        speed = (self.n - self.initial) / (time.time() - self.start_t)
        left = (self.total - self.n) / speed
        if left > MEASURED:
            self.write(f"{self.desc}: about {duration(left)} on this machine")


def duration(seconds):
    """duration(130) == "2 minutes"."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


class LogFile:
    """stderr where it is a file: the carriage returns of a bar become line ends."""

    def write(self, text):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")


# ------------------------------------------------------------------------------------------------
# Device, number type, processes


def pick_device(name=""):
    """torch.device of that name; "" takes cuda, else mps, else cpu. UserError if it is not here.

    Under torchrun "cuda" is this process's own GPU, chosen before any GPU is touched.
    """
    if not name and torch.cuda.is_available():
        name = "cuda"
    elif not name and torch.backends.mps.is_available():
        name = "mps"
    # Each backend has its own way to be absent.
    with contextlib.suppress(Exception):
        device = torch.device(name or "cpu")
        if device.type == "cuda":
            own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(own if device.index is None else device)
        torch.empty(1, device=device)
        if device.type in ("cpu", "cuda", "mps"):
            return device
    raise UserError(f"device {printable(name)} is not available here: use --device cpu, "
                    "or leave it out; torchrun needs a GPU for each process")


def precision(device):
    """The dtype of large products: bfloat16 where a probe finds it faster, else float32.

    A CPU without bfloat16 instructions emulates them, 100 times slower.
    """
    if device.type == "mps":
        return torch.float32
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    # Large enough that the launch time is negligible.
    n = 256 if device.type == "cpu" else 2048
    # In turns, and the best counts: others may use the machine.
    for _ in range(8):
        for dtype in best:
            a = torch.ones(n, n, device=device, dtype=dtype)
            start = time.perf_counter()
            (a @ a).sum().item()
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return min(best, key=best.get)


def autocast(device, dtype):
    """The context that computes large products in `dtype`. Off for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def is_first():
    """Whether this is the process that prints and saves."""
    return os.environ.get("RANK", "0") == "0"


def join(device, batch=0):
    """Joins the processes that torchrun started: (which one this is, how many), else (0, 1).

    From here on the first process alone prints. UserError if they cannot share a `batch`.
    """
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend)
            # a process that leaves without it may abort
            atexit.register(dist.destroy_process_group)
        except ValueError as error:
            raise UserError(f"{printable(error)}: start with torchrun, or unset RANK") from None
        if not is_first():
            sys.stdout = open(os.devnull, "w")
    process, world = dist.get_rank(), dist.get_world_size()
    if batch % world:
        raise UserError(f"--batch {batch} cannot be split over {world} processes: "
                        f"give a multiple of {world}")
    return process, world


def alone(script):
    """UserError under torchrun, for a script that several processes cannot share."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"{script} is for one process: run python {script}, without torchrun")


def in_turn(parts):
    """Gathers a list whose item i was made by process i % world: the whole list, for all.

    With two processes, ["a", "c"] and ["b"] become ["a", "b", "c"].
    """
    if not dist.is_initialized():
        return parts
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, parts)
    turns = itertools.zip_longest(*every)
    return [part for turn in turns for part in turn if part is not None]


# ------------------------------------------------------------------------------------------------
# 3. Machinery: skip this on a first reading


def bump(v, centre, width):
    """A bell of height 1 around `centre`."""
    return np.exp(-((v - centre) / width) ** 2)


def unit(v):
    """Clipped to 0..1."""
    return np.minimum(np.maximum(v, 0), 1)


def edge(s, distance, width=0.0):
    """0 outside, 1 inside, a ramp between."""
    return unit(0.5 + distance * (1 / max(width, 1 / s.size)))


def tint(s, alpha, colour):
    """Mixes a colour into the picture: alpha [H, W] in 0..1."""
    s.picture += alpha * (colour - s.picture)


def paint(s, alpha, colour, name, threshold=0.5):
    """The same, and where alpha is above the threshold the label becomes `name`."""
    tint(s, alpha, colour)
    np.copyto(s.labels, SUNSET_LABELS.index(name), where=alpha > threshold)


def sky_colour(s, height):
    """height: 0 at the horizon, 1 at the top."""
    colour = s.horizon + (s.middle - s.horizon) * unit(2 * height)
    return colour + (s.top * (0.8 if s.low else 1) - colour) * unit(2 * height - 1)


def paint_sky(s):
    """The sky, and the sun's glow in it."""
    s.picture[:] = sky_colour(s, 1 - s.y / s.line)
    tint(s, 0.75 * bump(s.x, s.sun_x, 0.36) * bump(s.y, s.sun_y, 0.2), s.horizon)
    wide = 1.8 * s.radius
    tint(s, 0.55 * bump(s.x, s.sun_x, wide) * bump(s.y, s.sun_y, wide), s.rim)


def paint_sun(s):
    """A disc, bright in its middle."""
    away = np.sqrt((s.x - s.sun_x) ** 2 + (s.y - s.sun_y) ** 2)
    outwards = 0.1 + 0.5 * np.minimum(away / s.radius, 1) ** 3
    paint(s, edge(s, s.radius - away), s.core + (s.rim - s.core) * outwards, "sun")


def paint_cloud(s, cx, cy, width, puffs):
    """Puffs on a flat base. The light comes from the sun."""
    tx = s.sun_x - cx
    ty = s.sun_y - cy
    far = math.hypot(tx, ty)
    tx /= far
    ty /= far
    px, py, pr = (np.array(p, np.float32) * width for p in zip(*puffs))  # [6] each

    def density(sx, sy):
        rows = bump(s.y, cy + sy + py, 0.75 * pr)  # [H, 6]
        return rows @ bump(s.x.T, cx + sx + px, pr).T  # @ [6, W]

    here = density(0, 0)
    # Above 0 where the next puff does not shade.
    toward = here - density(-0.25 * width * tx, -0.25 * width * ty)
    light = 0.5 + 0.6 * toward + 0.3 * ((s.x - cx) * tx + (s.y - cy) * ty) / width
    soft = max(0.16, 10 / s.size)
    alpha = unit(0.5 + (here - 0.5) / soft) * edge(s, cy + 0.15 * width - s.y, 0.02)
    paint(s, alpha, s.shade + unit(light) * (s.lit - s.shade), "cloud")


def paint_hills(s):
    """Bluer and paler the farther they are. They leave a gap for a low sun."""
    gap = 1 - 0.9 * bump(s.x, s.sun_x, 2.2 * s.radius) if s.low else 1
    s.heights = [gap * k * sum(h * bump(s.x, c, w) for c, w, h in hills)
                 for k, hills in zip((1, 0.6), s.hills)]
    for height, haze in zip(s.heights, (0.5, 0.15)):
        colour = haze * s.horizon + (1 - haze) * 0.6 * s.shade
        paint(s, edge(s, s.y - s.line + height), colour, "hills")


def paint_sea(s):
    """It mirrors sky, hills and sun, darker and in larger waves towards the viewer."""
    x = s.x
    a, b, c, d = s.waves
    # 0 at the horizon, 1 at the viewer's feet
    t = unit((s.y - s.line) / (1 - s.line))
    depth = 1 / (t + 0.22)
    sea = edge(s, s.y - s.line)
    paint(s, sea, sky_colour(s, t) * (0.82 - 0.3 * t), "sea")
    for height in s.heights:
        mirrored = edge(s, 0.8 * height - (s.y - s.line), 0.05)
        tint(s, sea * mirrored * 0.4, 0.5 * s.shade)

    bend = 1.2 * np.sin(5 * x + b)
    ripple = np.sin(8 * depth + a + bend + 0.7 * np.sin(11 * x * np.sqrt(depth) + c))
    if s.size > 32:
        # Finer waves, where there are pixels enough to show them.
        swell = 2 * np.sin(9 * x + d) + 3 * np.sin(13 * x * depth + b)
        ripple += min(1, s.size / 64 - 0.5) * t * np.sin(50 * depth + swell)
    tint(s, sea * np.minimum(4 * t, 1) * 0.10 * (ripple + 0.3), s.horizon)

    wide = s.radius * (0.55 + 0.9 * t) * (1 + 0.3 * np.sin(11 * depth + d))
    glitter = bump(x, s.sun_x + 0.015 * np.sin(8 * depth + a), wide)
    glitter = glitter * (0.95 - 0.3 * t) * (0.85 + 0.15 * ripple)
    paint(s, sea * glitter, s.rim + (s.core - s.rim) * 0.6 * glitter, "reflection", 0.4)


def read_image(path, size=None, over="white"):
    """An image file -> uint8 [3, size, size]: upright, over white, first frame, centre square.

    Without a size it stays as large as it is. An Exception of any kind if it cannot be read.
    """
    # Opening a named pipe would wait for ever.
    if not os.path.isfile(path):
        raise ValueError("not a file")
    with Image.open(path, formats=FORMATS) as image:
        if size:
            # A large JPEG is decoded at a fraction of its size.
            image.draft(None, (2 * size, 2 * size))
        image.load()
    # A broken EXIF block does not spoil the picture.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":
        image = deep_grey(image)
    if image.has_transparency_data:
        image = square(image.convert("RGBA"), size)
        image = Image.alpha_composite(Image.new("RGBA", image.size, over), image)
    image = square(image.convert("RGB"), size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def deep_grey(image):
    """Grey of 16 bits, or floats -> 8 bits.

    No file says what white is. Cameras put 12 bits into files of 16. Floats end at 1 or at 255.
    """
    grey = np.nan_to_num(np.asarray(image.convert("F")), posinf=0, neginf=0)
    high = grey.max()
    white = 4095 if 255 < high <= 4095 else 65535
    if image.mode == "F":
        white = 1 if high <= 1 else 255
    grey *= 255 / max(white, high)
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))


def square(image, size):
    """The centre square of a PIL image, resized to size x size. None leaves it as it is."""
    if size is None or image.size == (size, size):
        return image
    side = min(image.size)
    left = (image.width - side) / 2
    top = (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box, reducing_gap=3)


def list_files(root):
    """([all files that are not hidden, relative, with /], [a line for each locked folder])."""
    names = []
    errors = []
    seen = set()
    for folder, inner, files in os.walk(root, onerror=errors.append, followlinks=True):
        # Links may run in circles: no folder is entered twice.
        real = os.path.realpath(folder)
        inner[:] = sorted(name for name in inner if name[0] != "." and real not in seen)
        if real not in seen:
            names += [Path(folder, name).relative_to(root).as_posix()
                      for name in files if name[0] != "."]
        seen.add(real)
    return names, [f"{printable(error.filename)} ({error.strerror})" for error in errors]


def ending(name):
    """The ending ".png" of "a/B.PNG"."""
    return posixpath.splitext(name)[1].lower()


def bytes_of(path):
    """The size of a file; -1 for a link to nowhere."""
    return os.path.getsize(path) if os.path.exists(path) else -1


def open_text(path):
    """A text file in UTF-8, or in UTF-16 where its byte order mark says so."""
    with open(path, "rb") as file:
        utf16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    return open(path, encoding="utf-16" if utf16 else "utf-8-sig", errors="replace")


def idx_files(path):
    """{("train" or "test", "images" or "labels"): file} of a folder, or beside an IDX file."""
    folder = path
    prefix = ""
    if os.path.isfile(path):
        folder, base = os.path.split(path)
        # EMNIST has emnist-letters-train-images-idx3-ubyte and more such sets.
        prefix = re.escape(re.split("train|t10k|test", base)[0])
    files = {}
    # In this order a plain file comes before its .gz.
    for name in sorted(os.listdir(folder or ".")):
        found = re.fullmatch(
            prefix + r"(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(\.gz)?", name)
        if found:
            part = "train" if found[1] == "train" else "test"
            files.setdefault((part, found[2]), os.path.join(folder, name))
    if os.path.isfile(path) and path not in files.values():
        return {("train", "images"): path}
    return files


def read_idx(path, dimensions):
    """uint8 array of an IDX file: the bytes 0 0 8 `dimensions`, each size as >u4, the content."""
    try:
        with open(path, "rb") as file:
            raw = file.read()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        if raw[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(f"not an IDX file of {dimensions} dimensions")
        shape = np.frombuffer(raw, ">u4", dimensions, 4).tolist()
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{printable(path)} cannot be read ({printable(error)}): "
                        "--data takes a folder of images, an IDX file, or sunsets") from None


def keep_memory():
    """Freed blocks of up to 32 MB stay with this process, up to 512 MB together.

    glibc normally returns them to the kernel. A training step then gets its memory again page by
    page: more than 10,000 page faults, a sixth of its time on two cores.
    """
    # No such library, no such function, Windows.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        M_TRIM_THRESHOLD = -1
        M_MMAP_THRESHOLD = -3
        set_option = ctypes.CDLL(None).mallopt
        set_option(M_MMAP_THRESHOLD, 2 ** 25)
        set_option(M_TRIM_THRESHOLD, 2 ** 29)


def main():
    parser = arguments(__doc__, ("data", "out", "seed"))
    parser.add_argument("--size", type=number(int, 1, 4096), default=64,
                        help="side of an image in pixels")
    parser.add_argument("--split", default="train", help="train or test")
    args = parser.parse_args()
    alone("data.py")
    dataset = open_data(args.data or "sunsets", args.size, args.split)
    writable(args.out)
    describe(dataset)
    if not len(dataset):
        raise UserError(f"{dataset.name} has no image in its {args.split} split: add more images")
    chosen = permutation(len(dataset), args.seed, 0)[:24]
    for i in chosen:
        print(f"{i:8d}  {dataset[i][1]}")
    images = [dataset[i][0] for i in chosen]
    path = os.path.join(args.out, "data.png")
    save_picture(path, sheet(images, 8, math.ceil(96 / args.size)))
    print(f"wrote {printable(path)}: these {len(images)} images, row by row")


if __name__ == "__main__":
    run(main)
