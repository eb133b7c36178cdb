"""Images and their captions, from three places, as one kind of dataset.

    open_data("sunsets")           50,000 small landscapes that this file renders: nothing to download
    open_data("photos/")           a folder, nested or flat: png jpg jpeg webp bmp gif tif, in any letter case
    open_data("fashion-mnist/")    IDX files, gzipped or not (or the path of one of them)

Each item is (uint8 tensor [3, size, size], caption str), read when it is asked for: data may be larger than memory.
Where there is no test split, a tenth is held out, of a folder by name: copies of an image may be on both sides. What
data a .pt was made from is told by a fingerprint, for a folder of the names, sizes and captions of its files.
In a sunset the sun *causes* the rest: its colour and place decide the sky, the lit side of every cloud, the haze on
the hills and the glitter on the sea. So there is a best first thing to draw, and an order can find it.

The other files borrow their few shared tools from here: the flags, errors in one line, and .pt files that are
written whole or not at all (`save`) and read with distrust (`load`).

    python data.py          about 3 seconds: prints what it found and writes out/data.png, a sheet of 24 images

It does not augment, download or train anything.
"""
import argparse
import contextlib
import csv
import ctypes
import functools
import gzip
import hashlib
import math
import os
import re
import signal
import stat
import sys
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # whatever the ending says; never EPS, which starts a program
MAX_PIXELS = 50_000_000  # a 48-megapixel photo is read; more is skipped before any of it is decoded
MAX_BYTES = 2 ** 28      # of an image file
MAX_CAPTION = 1000       # characters
VERSION = 1              # of the .pt files
GARMENTS = "tshirt trouser pullover dress coat sandal shirt sneaker bag boot".split()  # the labels of Fashion-MNIST
SUNSETS, SUNSETS_TRAIN = 50_000, 45_000
SUNSETS_VERSION = 1      # to be raised when the renderer changes, so that old tokens are not mistaken for new ones

TOO_LARGE = "error: out of memory: try a smaller --batch, smaller images or a smaller model"

warnings.filterwarnings("ignore", module="PIL")  # its remarks on odd files would look like errors of ours


# ------------------------------------------------------------------------------- tools that every script shares

class UserError(Exception):
    """Bad input. The message is one line: the value, what was expected, and the command that mends it."""


def run(main):
    """Call `main()`. What a user can mend becomes one line on stderr and exit code 2; Ctrl-C gives exit code 130."""
    def end(message, code=2):
        if message:
            tqdm.write(message, file=sys.stderr)  # below a progress bar, where there is one
        sys.exit(code)

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a caption must not crash a terminal that lacks its letters
    keep_memory()
    try:
        main()
        if sys.stdout:  # None where it was closed
            sys.stdout.flush()
    except UserError as error:  # a DataLoader worker puts its traceback before the message: keep the last line
        end("error: " + re.sub(r"^\w+\.UserError: ", "", (str(error).strip().splitlines() or ["bad input"])[-1]))
    except KeyboardInterrupt:
        end("stopped" if os.environ.get("RANK", "0") == "0" else "", 130)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        end("", 1)
    except (MemoryError, torch.OutOfMemoryError):
        end(TOO_LARGE)
    except OSError as error:
        end(f"error: {printable(error.filename or 'writing')}: {printable(error.strerror or error)}")
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # so says torch on a CPU
            end(TOO_LARGE)
        if "RANK" not in os.environ or not re.search("gloo|nccl", str(error).lower()):
            raise
        end("error: another process of this run has died, so this one ends too: that one's message tells why", 1)


def keep_memory():
    """Blocks of up to 32 MB that are freed stay with this process, up to 512 MB together, where the C library is glibc.
    By itself it gives them back to the kernel, and a training step gets its memory again page by page: more than 10,000
    page faults, a sixth of its time on two cores."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no such library, no such function, Windows
        set_option, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = ctypes.CDLL(None).mallopt, -1, -3
        set_option(M_MMAP_THRESHOLD, 2 ** 25)
        set_option(M_TRIM_THRESHOLD, 2 ** 29)


def on_interrupt():
    """A list that the first Ctrl-C fills: finish the step, save, leave. The second one leaves at once."""
    asked = []

    def handler(*_):
        asked.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, handler)
    return asked


def arguments(doc, flags=("data", "out", "seed", "device")):
    """An argparse parser with the flags that mean the same in every script. `doc` is the script's docstring."""
    def seed(text):
        return int(text) % 2 ** 63  # the range that torch accepts

    def error(message):
        raise UserError(f"{printable(message)}: {parser.prog} --help lists the flags")

    class Help(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            told = action.default is not False and action.default not in (None, "", [])
            return super()._get_help_string(action) if told else action.help

    parser = argparse.ArgumentParser(description=" ".join(doc.strip().split("\n\n")[0].split()), allow_abbrev=False,
                                     formatter_class=Help)
    parser.error = error
    known = dict(data=dict(default="sunsets", help="a folder of images, an IDX file, or sunsets"),
                 out=dict(default="out", help="the folder of all files that stages write and read"),
                 seed=dict(default=0, type=seed, help="makes runs on a CPU repeatable"),
                 device=dict(default="", help="cpu, cuda or mps; empty takes the best there is"))
    for flag in flags:
        parser.add_argument("--" + flag, **known[flag])
    return parser


def pick_device(name=""):
    """torch.device of that name; "" takes cuda, else mps, else cpu. UserError if there is no such device here."""
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)              # what names no GPU, such as a wait for it, means this
        if device.type in ("cpu", "cuda", "mps"):
            return device
    except Exception:  # each backend has its own way to be absent
        pass
    raise UserError(f"device {printable(name)} is not available here: use --device cpu, or leave it out")


def printable(text):
    r"""`text` on one line: control characters and undecodable bytes become escapes. printable("a\nb") == r"a\nb"."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def words_of(caption):
    """The words of a caption. words_of("T-shirt, red_2") == ["t", "shirt", "red", "2"]"""
    return re.findall(r"[^\W_]+", caption.lower())


def to_float(images):
    """uint8 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float in [-1, 1] -> uint8, by rounding (truncating would darken every image); what lies beyond is clipped."""
    return (images.float().nan_to_num() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def sheet(images, columns, scale=1, gap=2):
    """A contact sheet: images [n, 3, H, W], uint8 or float in [-1, 1] -> PIL image, row by row on white."""
    images = torch.stack(list(images)).cpu()
    images = images if images.dtype == torch.uint8 else to_uint8(images)
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    n, _, height, width = images.shape
    rows, columns = math.ceil(n / columns), min(n, columns)
    page = torch.full((3, rows * (height + gap) + gap, columns * (width + gap) + gap), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        page[:, top:top + height, left:left + width] = image
    return Image.fromarray(page.permute(1, 2, 0).contiguous().numpy())


def fingerprint(*parts):
    """16 hex digits that name a content: of str, bytes, numbers, None, tensors, and nested lists and dicts of them."""
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
        else:  # type and length keep ("ab", "c"), ("a", "bc") and ("a", b"bc") apart
            raw = part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogateescape")
            digest.update(f"{type(part).__name__} {len(raw)} ".encode() + raw)
    add(parts)
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------- files, whole or not at all

@contextlib.contextmanager
def replacing(path):
    """`with replacing(path) as file:` write to `file`; only when all is on the disk does it take the place of `path`.
    A reader never sees half a file, and a full disk leaves the old one. UserError if it cannot be written."""
    path = str(path)
    temporary = path + ".tmp"  # in the same folder: a rename is atomic only within one disk
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or "could not be written (is the disk full?)"
        raise UserError(f"{printable(path)}: {printable(reason)}: make room or choose another --out") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def save(path, contents):
    """Write a dict of plain tensors and built-in types to the .pt file `path`."""
    with replacing(path) as file:
        torch.save(contents, file)


def save_picture(path, picture):
    """Write a PIL image to the .png file `path`."""
    with replacing(path) as file:
        picture.save(file, "PNG")


def load(path, kind, made_by):
    """The dict that `save` wrote to `path`. UserError, naming the command `made_by` that writes such a file, if it is
    missing, truncated, corrupted, of another `kind`, or newer than this code. Nothing in the file is executed."""
    name, remedy = printable(path), f"run {made_by} first"
    if not os.path.isfile(path):
        raise UserError(f"{name} does not exist: {remedy}")
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            # torch stores and never compresses: more bytes than the file has are a bomb. testzip compares the
            # checksums, which torch.load does not: a flipped bit in a weight would go unnoticed.
            if sum(entry.file_size for entry in archive.infolist()) > size or archive.testzip():
                raise ValueError
            # the one allowed type that takes memory by a mere number
            if any(b"bytearray\n" in archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")):
                raise ValueError
            file.seek(0)
            contents = torch.load(file, weights_only=True, map_location="cpu")
        todo, seen = [contents], set()  # `seen`: a list may hold itself
        while todo:
            part = todo.pop()
            if isinstance(part, torch.Tensor) and part.numel() * part.element_size() > size:
                raise ValueError  # a stride of 0 lets a tensor claim any size
            if isinstance(part, (dict, list, tuple)) and id(part) not in seen:
                seen.add(id(part))
                todo += part.values() if isinstance(part, dict) else part
    except PermissionError:
        raise UserError(f"{name} cannot be read: permission denied") from None
    except Exception:  # a corrupted archive fails in a hundred ways
        raise UserError(f"{name} is damaged or not a .pt file: {remedy}") from None
    types = dict(kind=str, version=int, config=dict, made_from=dict)
    if not isinstance(contents, dict) or any(type(contents.get(key)) is not types[key] for key in types):
        raise UserError(f"{name} is not a .pt file of this project: {remedy}")
    if contents["kind"] != kind:
        raise UserError(f"{name} holds {printable(contents['kind'])[:40]}, expected {kind}: {remedy}")
    if not 1 <= contents["version"] <= VERSION:
        raise UserError(f"{name} has version {contents['version']}, this code knows {VERSION}: {remedy}")
    return contents


def restore(make, file, path, made_by):
    """The network `make(config)` with the weights of a file that `load` has read. Sizes are compared before any memory
    is taken for them. UserError if they do not fit."""
    try:
        if file["config"].get("layers", 0) > len(file["model"]):  # a billion, even without weights, would take for ever
            raise ValueError
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in make(file["config"]).state_dict().items()}
        if {name: tensor.shape for name, tensor in file["model"].items()} != shapes:
            raise ValueError
        network = make(file["config"])
        network.load_state_dict(file["model"])
        return network
    except Exception:  # a config may hold anything
        raise UserError(f"{printable(path)} is damaged, its config and weights do not fit: "
                        f"run {made_by} again") from None


# ------------------------------------------------------------------------------- one image file

TURNS = dict(zip(range(2, 9), (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180,  # the EXIF orientations
                               Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270,
                               Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)))


def read_image(path, size=None, over="white"):
    """An image file -> uint8 [3, size, size]: upright, over white, first frame, short side to `size`, centre crop.
    Without a size it stays as large as it is. Raises an Exception of any kind if it cannot be read; nothing above
    MAX_PIXELS is decoded."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
        raise ValueError("not a regular file")
    if status.st_size > MAX_BYTES:
        raise ValueError("file too large")
    with open(path, "rb") as file:
        image = Image.open(file, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} is too large")
        if size:
            image.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at a fraction of its size
        image.load()
        try:
            turn = TURNS.get(image.getexif().get(0x0112))
        except Exception:  # a broken EXIF block does not spoil the picture
            turn = None
    if image.mode[0] in "IF":  # 16-bit, 32-bit and float grey: white is 65535, or 1 for floats, or the maximum if above
        grey = np.nan_to_num(np.asarray(image.convert("F")), posinf=0, neginf=0)
        white = max(1.0 if image.mode == "F" else 65535.0, grey.max())
        grey = np.asarray(square(Image.fromarray(grey), size)) * (255 / white)
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:  # also of palettes
        image = square(image.convert("RGBA"), size)
        image = Image.alpha_composite(Image.new("RGBA", image.size, over), image)
    image = square(image.convert("RGB"), size)
    if turn is not None:
        image = image.transpose(turn)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def square(image, size):
    """The largest centred square of a PIL image, resized to size x size without aliasing. None leaves it as it is."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if size is None or image.size == (size, size):
        return image
    return image.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side), reducing_gap=3)


# ------------------------------------------------------------------------------- a folder of images

class Folder(torch.utils.data.Dataset):
    """One split of a folder. Opening lists the files and decodes until one is readable. The first use of the length
    decodes each image once, in threads, so that every broken file is known before it can stop a run."""

    def __init__(self, path, size, split):
        self.name, self.size, self.split, self.root = printable(path), size, split, path
        files, texts, self.locked = find_images(path)
        rows = read_metadata(os.path.join(path, "metadata.csv"))
        if not files:
            raise UserError(f"{self.name} has no images: expected files that end in {' '.join(ENDINGS)}")
        self.all_captions = {name: caption_of(path, name, rows, texts) for name in files}
        self.fingerprint = fingerprint("folder", [(os.fsencode(n), files[n], self.all_captions[n]) for n in files])
        self.unused_rows = len(rows.keys() - files.keys())
        self.mine = [name for name in files if held_out(name) == (split == "test")]
        readable = next((n for n in self.mine + list(files) if not self.problem(n)), None)
        if readable is None:
            first = next(iter(files))
            raise UserError(f"{self.name}: none of {len(files):,} images can be read, such as {printable(first)} "
                            f"({self.problem(first)})")
        if split == "train" and readable not in self.mine:
            raise UserError(f"{self.name}: none of {len(files):,} images is both readable and outside the held-out "
                            "tenth: add more images")

    def problem(self, name):
        """Why an image cannot be read, in a few words; "" if it can."""
        try:
            read_image(os.path.join(self.root, name), self.size)
        except Exception as error:  # decoders raise nearly everything: OSError, SyntaxError, struct.error, KeyError ...
            return printable(getattr(error, "strerror", None) or str(error).split(" <")[0] or type(error).__name__)[:80]
        return ""

    @functools.cached_property
    def checked(self):
        """([names of the readable images], [one line for each thing that was skipped])"""
        good, bad = [], list(self.locked)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool, \
                tqdm(total=len(self.mine), desc="checking images", delay=2, leave=False) as bar:
            for start in range(0, len(self.mine), 1000):
                chunk = self.mine[start:start + 1000]
                for name, problem in zip(chunk, pool.map(self.problem, chunk)):
                    if problem:
                        bad.append(f"{printable(name)} ({problem})")
                    else:
                        good.append(name)
                    bar.update()
        return good, bad

    @property
    def skipped(self):
        return self.checked[1]

    @property
    def captions(self):
        return [self.all_captions[name] for name in self.checked[0]]

    def __len__(self):
        return len(self.checked[0])

    def __getitem__(self, i):
        name = self.checked[0][i]
        try:
            return read_image(os.path.join(self.root, name), self.size), self.all_captions[name]
        except Exception:
            raise UserError(f"{printable(os.path.join(self.root, name))} could be read before and cannot any more: "
                            "check the folder and start again") from None


def held_out(name):
    """Whether this relative name (with /) belongs to the test split: a tenth of all names, whatever else is there."""
    return int(hashlib.sha256(os.fsencode(name)).hexdigest(), 16) % 10 == 0


def find_images(root):
    """({relative name with /: bytes}, sorted; {names of .txt files}; [folders that cannot be read]). Follows links to
    folders, but enters no folder twice: links in circles end. Leaves out hidden names, such as macOS's ._photo.jpg"""
    files, texts, locked, seen, todo = {}, set(), [], set(), [""]
    while todo:
        folder = todo.pop()
        try:
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            locked.append(f"{printable(folder or root)} ({error.strerror})")
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            try:
                is_folder, size = entry.is_dir(), entry.stat().st_size
            except OSError:  # a link to nowhere or to itself: listed here, named as unreadable later
                is_folder, size = False, -1
            if entry.name.startswith("."):
                continue
            if is_folder:
                todo.append(name)
            elif entry.name.lower().endswith(ENDINGS):
                files[name] = size
            elif entry.name.endswith(".txt"):
                texts.add(name)
    return dict(sorted(files.items())), texts, locked


def read_metadata(path):
    """{relative name: caption} from a csv file with the columns file_name and text; {} if there is no such file."""
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:  # as os names files
            reader = csv.DictReader(file, strict=True, skipinitialspace=True)
            columns = reader.fieldnames or []
            if not {"file_name", "text"} <= set(columns):
                raise UserError(f"{printable(path)} begins with {printable(','.join(columns))[:80]}, "
                                "expected file_name,text")
            rows = {}
            for row in reader:
                if None in row:
                    raise UserError(f"{printable(path)}, line {reader.line_num} has more than {len(columns)} columns: "
                                    'put a caption with a comma in double quotes, "like, this"')
                if row["file_name"]:
                    rows[os.path.normpath(row["file_name"].replace("\\", "/"))] = one_line(row["text"] or "")
            return rows
    except (csv.Error, OSError) as error:
        raise UserError(f"{printable(path)} is no readable csv file ({printable(error)}): mend or remove it") from None


def caption_of(root, name, rows, texts):
    """Of an image: its row in metadata.csv, else the .txt beside it, else the name of its sub-folder, else empty."""
    if name in rows:
        return rows[name]
    beside = os.path.splitext(name)[0] + ".txt"
    with contextlib.suppress(OSError):
        if beside in texts and os.path.isfile(os.path.join(root, beside)):
            with open(os.path.join(root, beside), encoding="utf-8-sig", errors="replace") as file:
                return one_line(file.read(2 * MAX_CAPTION))
    return one_line(name.split("/")[-2]) if "/" in name else ""


def one_line(text):
    """A caption without line breaks, control characters and broken unicode, of at most MAX_CAPTION characters."""
    text = text[:2 * MAX_CAPTION]
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:MAX_CAPTION]


# ------------------------------------------------------------------------------- IDX files (MNIST and its kin)

IDX_NAME = re.compile(r"(.*?)(train|t10k|test)[-_.](images|labels)[-_.]idx[13]-ubyte(\.gz)?", re.I)


class Idx(torch.utils.data.Dataset):
    """One split of IDX files: the t10k (or test) files are the test split, or a tenth by hash if there are none."""
    skipped = ()

    def __init__(self, path, size, split):
        self.name, self.size, self.split = printable(path), size, split
        files = idx_files(path)
        self.fingerprint = fingerprint("idx", [
            (key, os.path.getsize(file), np.fromfile(file, np.uint8, 2 ** 20).tobytes())  # the first megabyte will do
            for key, file in sorted(files.items())])
        own_test = ("test", "images") in files
        part = "test" if own_test and split == "test" else "train"
        if (part, "images") not in files:
            raise UserError(f"{self.name} has no train-images-idx3-ubyte or train-images-idx3-ubyte.gz")
        self.images = read_idx(files[part, "images"], 3)
        labels = read_idx(files[part, "labels"], 1).tolist() if (part, "labels") in files else None
        if labels and len(labels) != len(self.images):
            raise UserError(f"{self.name} has {len(self.images)} images but {len(labels)} labels: fetch both again")
        folder, file = (os.path.abspath(path), "") if os.path.isdir(path) else os.path.split(os.path.abspath(path))
        folder = folder.removesuffix(os.sep + "raw")  # where torchvision puts them
        names = GARMENTS if "fashion" in (os.path.basename(folder) + file).lower() else []
        self.rows = [i for i in range(len(self.images)) if own_test or held_out(str(i)) == (split == "test")]
        words = [names[k] if k < len(names) else str(k) for k in range(256)]
        self.captions = [words[labels[i]] if labels else "" for i in self.rows]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        image = square(Image.fromarray(np.array(self.images[self.rows[i]])), self.size)
        return torch.from_numpy(np.array(image)).expand(3, -1, -1).contiguous(), self.captions[i]


def idx_files(path):
    """{("train" or "test", "images" or "labels"): file} for a folder, or for one file and its siblings; {} if none."""
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    families = {}
    for name in sorted(os.listdir(folder), reverse=True):  # reversed, so that a plain file comes after its .gz and wins
        match = IDX_NAME.fullmatch(name)
        if match and os.path.isfile(os.path.join(folder, name)):
            part = "train" if match[2].lower() == "train" else "test"
            families.setdefault(match[1], {})[part, match[3].lower()] = os.path.join(folder, name)
    if not os.path.isdir(path):
        match = IDX_NAME.fullmatch(os.path.basename(path))
        return families[match[1]] if match else {("train", "images"): path}
    if len(families) > 1:
        one = next(iter(families.popitem()[1].values()))
        raise UserError(f"{printable(path)} has several sets of IDX files: name one file, such as {printable(one)}")
    return families.popitem()[1] if families else {}


def read_idx(path, dimensions):
    """uint8 array of an IDX file: the bytes 0 0 8 `dimensions`, each size as 4 bytes (big end first), then the data.
    The sizes are compared with the file before memory is taken; a plain file stays on the disk (memory map)."""
    name, header, there = printable(path), 4 + 4 * dimensions, os.path.getsize(path)
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(path, "rb") as file:
            head = file.read(header)
            if len(head) < header or head[:4] != bytes([0, 0, 8, dimensions]):
                raise UserError(f"{name} is not an IDX file of {dimensions} dimensions: "
                                "--data takes a folder of images, an IDX file, or sunsets")
            shape = [int.from_bytes(head[i:i + 4], "big") for i in range(4, header, 4)]
            length = math.prod(shape)
            most = min(1100 * there, 2 ** 31) if packed else there - header  # gzip packs to a thousandth at best
            if not 0 < length <= most or math.prod(shape[1:]) > MAX_PIXELS:
                raise UserError(f"{name} claims {' x '.join(map(str, shape))} bytes, which cannot be: fetch it again")
            if not packed and length == most:
                return np.memmap(path, np.uint8, "r", header, tuple(shape))
            if packed:
                data = file.read(length)
                if len(data) == length and not file.read(1):
                    return np.frombuffer(data, np.uint8).reshape(shape)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name} cannot be read ({printable(error)}): fetch it again") from None
    raise UserError(f"{name} is shorter or longer than its header says: fetch it again")


# ------------------------------------------------------------------------------- sunsets

SUNSET_LABELS = ("sky", "sun", "cloud", "hills", "sea", "reflection")
PALETTES = {  # sun, its rim, sky at the horizon, half way up, at the top, lit side of a cloud, its shaded side
    "white": "fffdf2 fff6d8 f5ead2 a9c7da 5187bd fffdf6 93a9c4",
    "yellow": "fff9b0 ffe02e ffe0a0 a9bcc0 3c6ea8 fff2a8 8791a6",
    "orange": "ffdc8c ff9a1c ffb968 d08c7c 484c8e ffc070 7d6088",
    "red": "ff8c5a ff2c1c f58052 a84660 34285a ff7a52 5c3260",
    "pink": "ffd2e6 ff62aa ffc2b4 bd8cc0 5459a6 ffa8ce 7d629e",
}
PALETTES = {name: np.frombuffer(bytes.fromhex(colours), np.uint8).astype(np.float32).reshape(7, 3, 1, 1) / 255
            for name, colours in PALETTES.items()}
PLACES = {"on the left": 0.24, "in the middle": 0.5, "on the right": 0.76}
PUFFS = ((-0.75, 0.0, 0.32), (-0.35, -0.2, 0.42), (0.15, -0.36, 0.48), (0.55, -0.1, 0.40), (0.9, 0.05, 0.25),
         (0.0, 0.0, 0.5))  # of a cloud: x, y, radius in units of its width
COUNTS = ("no clouds", "one cloud", "two clouds", "three clouds")


class Sunsets(torch.utils.data.Dataset):
    """The built-in landscapes: indices below 45,000 are the train split, the other 5,000 the test split."""
    skipped = ()

    def __init__(self, size, split):
        self.name, self.size, self.split = "sunsets", size, split
        self.rows = range(SUNSETS_TRAIN) if split == "train" else range(SUNSETS_TRAIN, SUNSETS)
        self.fingerprint = fingerprint("sunsets", SUNSETS_VERSION)

    @property
    def captions(self):
        return [sunset_caption(i)[0] for i in self.rows]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return render_sunset(self.rows[i], self.size)[:2]


def sunset_caption(index):
    """(caption, and the choices behind it: colour, low, place, clouds, ranges of hills). A checksum of the index
    chooses, so that all 50,000 captions cost milliseconds and no picture."""
    code, choices = zlib.crc32(str(index).encode()), []
    for options in (list(PALETTES), (False, True), list(PLACES), range(len(COUNTS)), range(3)):
        choices.append(options[code % len(options)])
        code //= len(options)
    colour, low, place, clouds, _ = choices
    return f"{'low' if low else 'high'} {colour} sun {place} {COUNTS[clouds]}", *choices


def sunset_scene(index):
    """All that is random about landscape `index`: a dict, in units of the picture's side (x to the right, y down)."""
    caption, colour, low, place, count, ranges = sunset_caption(index)
    draw = iter(np.random.default_rng(index).random(128).tolist())  # one call to numpy costs more than its numbers

    def between(a, b):
        return a + (b - a) * next(draw)
    line, radius = between(0.60, 0.68), between(0.09, 0.11)  # of the horizon, of the sun
    sun = PLACES[place] + between(-0.06, 0.06), line - radius * between(0.15, 0.75) if low else between(0.16, 0.25)
    free = [(x, y) for x in (0.17, 0.5, 0.83) for y in (0.14, 0.28, 0.42) if math.dist((x, y), sun) > 0.22]
    clouds = []
    for _ in range(count):
        x, y = free.pop(int(next(draw) * len(free)))
        free = [spot for spot in free if math.dist(spot, (x, y)) > 0.2] or free
        flip = 1 if next(draw) < 0.5 else -1
        puffs = [(flip * u + between(-0.1, 0.1), v + between(-0.08, 0.08), r * between(0.85, 1.1)) for u, v, r in PUFFS]
        clouds.append((x + between(-0.08, 0.08), y + between(-0.03, 0.03), between(0.13, 0.19), puffs))
    hills = [[(between(-0.1, 1.1), between(0.10, 0.26), between(0.03, 0.11)) for _ in range(3)] for _ in range(ranges)]
    return dict(caption=caption, palette=PALETTES[colour], low=low, line=line, radius=radius, sun=sun,
                clouds=clouds, hills=hills, waves=[between(0, 2 * math.pi) for _ in range(4)])


def render_sunset(index, size=32):
    """Landscape `index` -> (uint8 [3, size, size], caption, labels uint8 [size, size] into SUNSET_LABELS). The same
    picture at every size: its edges are ramps one pixel wide, computed exactly, which is what averaging would give."""
    scene = sunset_scene(index)
    core, rim, horizon, middle, top, lit, shade = scene["palette"]
    line, radius, (sun_x, sun_y) = scene["line"], scene["radius"], scene["sun"]
    x = ((np.arange(size, dtype=np.float32) + 0.5) / size)[None, :]  # [1, W]
    y = x.T                                                          # [H, 1]
    picture = np.empty((3, size, size), np.float32)
    labels = np.zeros((size, size), np.uint8)

    def bump(v, centre, width):
        return np.exp(-((v - centre) / width) ** 2)

    def unit(v):
        return np.minimum(np.maximum(v, 0), 1)

    def edge(distance, width=0.0):  # 0 outside, 1 inside, a ramp between
        return unit(0.5 + distance * (1 / max(width, 1 / size)))

    def paint(alpha, colour, name, threshold=0.5):
        nonlocal picture
        picture += alpha * (colour - picture)
        np.copyto(labels, SUNSET_LABELS.index(name), where=alpha > threshold)

    def sky(height):  # 0 at the horizon, 1 at the top
        colour = horizon + (middle - horizon) * unit(2 * height)
        return colour + (top * (0.8 if scene["low"] else 1) - colour) * unit(2 * height - 1)

    # the sky, and the sun's glow in it
    picture[:] = sky(1 - y / line)
    picture += 0.75 * bump(x, sun_x, 0.36) * bump(y, sun_y, 0.2) * (horizon - picture)
    picture += 0.55 * bump(x, sun_x, 1.8 * radius) * bump(y, sun_y, 1.8 * radius) * (rim - picture)
    away = np.sqrt((x - sun_x) ** 2 + (y - sun_y) ** 2)
    paint(edge(radius - away), core + (rim - core) * (0.1 + 0.5 * np.minimum(away / radius, 1) ** 3), "sun")
    # clouds: puffs on a flat base; the light comes from the sun
    for cx, cy, width, puffs in scene["clouds"]:
        tx, ty = sun_x - cx, sun_y - cy
        far = math.hypot(tx, ty)
        tx, ty = tx / far, ty / far
        px, py, pr = (np.array(p, np.float32) * width for p in zip(*puffs))    # [6] each

        def density(sx, sy):
            return bump(y, cy + sy + py, 0.75 * pr) @ bump(x.T, cx + sx + px, pr).T     # [H, 6] @ [6, W]
        here = density(0, 0)
        toward = here - density(-0.25 * width * tx, -0.25 * width * ty)       # > 0 where the next puff does not shade
        light = 0.5 + 0.6 * toward + 0.3 * ((x - cx) * tx + (y - cy) * ty) / width
        soft = max(0.16, 10 / size)
        paint(unit(0.5 + (here - 0.5) / soft) * edge(cy + 0.15 * width - y, 0.02),
              shade + unit(light) * (lit - shade), "cloud")
    # hills, bluer and paler the farther they are; they leave a gap for a low sun
    gap = 1 - 0.9 * bump(x, sun_x, 2.2 * radius) if scene["low"] else 1
    heights = [gap * k * sum(h * bump(x, c, w) for c, w, h in hills) for k, hills in zip((1, 0.6), scene["hills"])]
    for height, haze in zip(heights, (0.5, 0.15)):
        paint(edge(y - line + height), haze * horizon + (1 - haze) * 0.6 * shade, "hills")
    # the sea mirrors the sky and the hills, darker towards the viewer, in waves that grow towards the viewer
    t = unit((y - line) / (1 - line))                   # 0 at the horizon, 1 at the viewer's feet
    sea = edge(y - line)
    paint(sea, sky(t) * (0.82 - 0.3 * t), "sea")
    a, b, c, d = scene["waves"]
    depth = 1 / (t + 0.22)
    for height in heights:
        picture += sea * edge(0.8 * height - (y - line), 0.05) * 0.4 * (0.5 * shade - picture)
    ripple = np.sin(8 * depth + a + 1.2 * np.sin(5 * x + b) + 0.7 * np.sin(11 * x * np.sqrt(depth) + c))
    if size > 32:  # finer waves, where there are pixels enough to show them
        swell = 2 * np.sin(9 * x + d) + 3 * np.sin(13 * x * depth + b)
        ripple += min(1, size / 64 - 0.5) * t * np.sin(50 * depth + swell)
    picture += sea * np.minimum(4 * t, 1) * 0.10 * (ripple + 0.3) * (horizon - picture)
    wide = radius * (0.55 + 0.9 * t) * (1 + 0.3 * np.sin(11 * depth + d))
    glitter = bump(x, sun_x + 0.015 * np.sin(8 * depth + a), wide) * (0.95 - 0.3 * t) * (0.85 + 0.15 * ripple)
    paint(sea * glitter, rim + (core - rim) * 0.6 * glitter, "reflection", 0.4)
    image = (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return torch.from_numpy(image), scene["caption"], torch.from_numpy(labels)


# ------------------------------------------------------------------------------- the front door

def open_data(path="sunsets", size=32, split="train"):
    """Dataset of (uint8 [3, size, size], caption str): "sunsets", a folder, or IDX files (see the top of this file).
    `split` is "train" or "test". It has .name, .split, .captions, .skipped, and .fingerprint, equal for both splits.
    Prints nothing (see `describe`). Raises UserError for a path, size or split that makes no sense."""
    path = os.fspath(path)
    if split not in ("train", "test"):
        raise UserError(f"split {printable(split)}: expected train or test")
    if not isinstance(size, int) or not 1 <= size <= 4096:
        raise UserError(f"size {printable(size)}: expected a whole number of pixels from 1 to 4096")
    if path == "sunsets":
        return Sunsets(size, split)
    try:
        if os.path.isdir(path):
            return (Idx if idx_files(path) else Folder)(path, size, split)
        if os.path.isfile(path):
            return Idx(path, size, split)
    except OSError as error:
        raise UserError(f"{printable(path)} cannot be read: {error.strerror}") from None
    raise UserError(f"{printable(path) or 'no path'} does not exist: --data takes a folder, an IDX file, or sunsets")


def describe(dataset):
    """Print how many images, captions and distinct words a dataset has, and which files were skipped."""
    captions = dataset.captions
    words = {word for caption in set(captions) for word in words_of(caption)}
    print(f"{dataset.name} ({dataset.split}): {len(dataset):,} images, {len(set(captions) - {''}):,} captions, "
          f"{len(words):,} distinct words")
    if dataset.skipped:
        more = len(dataset.skipped) - 10
        print(f"skipped {len(dataset.skipped):,} unreadable: " + ", ".join(dataset.skipped[:10])
              + (f" and {more:,} more" if more > 0 else ""))
    if getattr(dataset, "unused_rows", 0):
        print(f"{dataset.unused_rows:,} rows of metadata.csv name no image here")


def main():
    parser = arguments(__doc__, ("data", "out", "seed"))
    parser.add_argument("--size", type=int, default=64, help="side of an image in pixels")
    parser.add_argument("--split", default="train", help="train or test")
    args = parser.parse_args()
    dataset = open_data(args.data, args.size, args.split)
    describe(dataset)
    if not len(dataset):
        raise UserError(f"{dataset.name} has no image in its {args.split} split: add more images")
    generator = torch.Generator().manual_seed(args.seed)
    chosen = torch.randperm(len(dataset), generator=generator)[:24].tolist()
    images, captions = zip(*(dataset[i] for i in chosen))
    for i, caption in zip(chosen, captions):
        print(f"{i:8d}  {caption}")
    path = os.path.join(args.out, "data.png")
    save_picture(path, sheet(images, 8, math.ceil(96 / args.size)))
    print(f"wrote {printable(path)}: these {len(images)} images, row by row")


if __name__ == "__main__":
    run(main)
