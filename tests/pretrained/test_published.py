"""Downloads from an https server on this machine that can cut, lie and change."""

import contextlib
import dataclasses
import hashlib
import http.server
import math
import os
import pathlib
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import trustme

from mlp_mixer import console, files, models, pretrained
from mlp_mixer.data import image_ops
from mlp_mixer.fingerprints import leaves
from mlp_mixer.models.model import IMAGENET
from mlp_mixer.pretrained import downloads, foreign, npz, published
from mlp_mixer.pretrained.foreign import Names
from mlp_mixer.pretrained.published import PUBLISHED, Published

NAME = "toy/Mixer-T_32"
TOY = Published(
    "mixer_s32", 7, {"num_blocks": 2, "hidden_dim": 64, "channels_mlp_dim": 128}
)
NOW = (0.0, 0.0, 0.0)  # Three more attempts, without waiting.
# time.sleep refuses it: there may be no further attempt.
NEVER = (-1.0,)


def shapes(entry):
    """{name: shape} of an entry's parameters, from the model itself."""
    model = models.create(entry.model, num_classes=entry.num_classes, **entry.overrides)
    image = jnp.zeros((1, 224, 224, 3))
    tree = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    return {name: x.shape for name, x in leaves(tree)}


def archive(path, seed):
    """An npz file of TOY's parameters; returns its bytes."""
    rng = np.random.default_rng(seed)
    arrays = {k: rng.normal(size=shape) for k, shape in shapes(TOY).items()}
    np.savez(path, **{k: x.astype(np.float32) for k, x in arrays.items()})
    return path.read_bytes()


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """Two files of TOY: as it is published, and as it might be one day."""
    folder = tmp_path_factory.mktemp("contents")
    return [archive(folder / f"{seed}.npz", seed) for seed in range(2)]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the server's next plan says."""

    protocol_version = "HTTP/1.1"
    server: "Site"

    def do_GET(self):
        site = self.server
        asked, condition = self.headers["Range"], self.headers["If-Range"]
        site.requests.append((self.path, asked, condition))
        plan = site.plans.pop(0) if site.plans else {}
        self.close_connection = True
        if plan.get("trickle"):
            return self.trickle(b"HTTP/1.1 200 OK\r\nX-Name: " + b"x" * 1000)
        etag = f'"{hashlib.md5(site.content).hexdigest()}"'
        etag = plan.get("etag", etag)
        status, body = plan.get("status", 200), site.content
        headers = {"ETag": etag, "Location": plan.get("location")}
        honoured = plan.get("ranges", True) and (
            condition == etag or plan.get("blind", False)
        )
        if status != 200:
            body = b""
        elif asked and honoured:
            start, size = int(asked[len("bytes=") : -1]), len(body)
            status, body = 206, body[start:]
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        headers["Content-Length"] = plan.get("length", len(body))
        if plan.get("chunked"):
            headers["Content-Length"], headers["Transfer-Encoding"] = None, "chunked"
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        if plan.get("drip"):
            return self.trickle(body)
        if plan.get("endless"):
            return self.trickle(bytes(10**9), 1 << 20)
        for piece in (body[: plan.get("hold", 0)], body[plan.get("hold", 0) :]):
            piece = piece[: plan.get("cut", len(piece))]
            site.sent += len(piece)
            self.wfile.write(piece)
            if plan.get("hold") and not site.holding.is_set():
                site.holding.set()
                site.go.wait(60)

    def trickle(self, content, size=1):
        """Sends a piece now and then, for 15 seconds, or until the client leaves."""
        end = time.monotonic() + 15
        while content and time.monotonic() < end and not self.server.go.is_set():
            self.wfile.write(content[:size])
            content = content[size:]
            time.sleep(0.01)

    def log_message(self, *arguments):
        pass


class Site(http.server.ThreadingHTTPServer):
    """An https server of one file.

    Attributes:
      content: of the file.
      plans: of the next requests, e.g. {"cut": 1000}; then all is well.
      requests: (path, Range, If-Range) of each that came.
      sent: bytes of content, over all requests.
    """

    def __init__(self, content, context):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.plans = content, []
        self.requests, self.sent = [], 0
        self.holding, self.go = threading.Event(), threading.Event()
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.url = f"https://localhost:{self.server_port}"

    @property
    def ranges(self):
        return [asked for _, asked, _ in self.requests]

    def handle_error(self, request, client_address):
        """Clients may leave."""


@pytest.fixture(scope="module")
def authority():
    """Whoever signs this machine's certificate; nobody trusts it unasked."""
    return trustme.CA()


@pytest.fixture
def site(contents, authority, tmp_path, monkeypatch):
    """TOY's server, its mirror and certificate named as a user would."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    site = Site(contents[0], context)
    thread = threading.Thread(target=site.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setitem(PUBLISHED, NAME, TOY)
    monkeypatch.setenv("MLP_MIXER_WEIGHTS_URL", site.url)
    monkeypatch.setenv("MLP_MIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setenv("no_proxy", "localhost")
    yield site
    site.go.set()
    site.shutdown()
    thread.join()
    site.server_close()


@pytest.fixture
def path(tmp_path):
    """Where TOY's file belongs."""
    return tmp_path / "cache" / f"{NAME}.npz"


def beside(path, suffix):
    return path.with_name(path.name + suffix)


def line(content):
    """What `sha256sum` prints."""
    return f"{hashlib.sha256(content).hexdigest()}  Mixer-T_32.npz\n"


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture
def offline(site, monkeypatch):
    """Nobody listens at the address."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"https://localhost:{unused.getsockname()[1]}"
    monkeypatch.setenv("MLP_MIXER_WEIGHTS_URL", address)
    return address


# --- The table ------------------------------------------------------------------------

MIB = {
    "imagenet1k/Mixer-B_16": 228.47,
    "imagenet1k/Mixer-L_16": 794.29,
    "imagenet21k/Mixer-B_16": 289.61,
    "imagenet21k/Mixer-L_16": 875.78,
    "sam/Mixer-B_16": 228.47,
    "sam/Mixer-B_32": 230.04,
    "gsam/Mixer-B_16": 228.47,
    "gsam/Mixer-B_32": 230.04,
    "gsam/Mixer-S_8": 78.79,
    "gsam/Mixer-S_16": 70.71,
    "gsam/Mixer-S_32": 72.91,
}


# Parameters of a released architecture of timm, as its results list them (millions).
HUB_MILLIONS = {"resmlp_12": 15.35, "resmlp_24": 30.02, "resmlp_36": 44.69} | {
    "resmlp_big_24": 129.14,
    "gmlp_s16": 19.42,
}


# What the READMEs of the authors' repositories link to, and what the accuracy there was
# evaluated by.
RELEASED = {
    **{
        f"cyclemlp/CycleMLP_B{i}": (
            "https://github.com/ShoufaChen/CycleMLP/releases/download/v0.1/"
            f"CycleMLP_B{i}.pth",
            "timm-0.9" if i < 4 else "timm",
        )
        for i in range(1, 6)
    },
    **{
        f"convmlp/convmlp_{size}_imagenet": (
            "https://shi-labs.com/projects/convmlp/checkpoints/"
            f"convmlp_{size}_imagenet.pth",
            "timm-0.9",
        )
        for size in "sml"
    },
    **{
        f"hiremlp/hire_mlp_{size}": (
            "https://github.com/ggjy/Hire-Wave-MLP.pytorch/releases/download/log/"
            f"hire_mlp_{size}.pth",
            "timm",
        )
        for size in ("tiny", "small", "base")
    },
    **{
        f"msmlp/msmlp_{size}_patch4": (
            "https://tsciencescu.blob.core.windows.net/projectshzheng/MSMLP/"
            f"released_model/msmlp_{size}_patch4/msmlp_{size}_patch4_ckpt_epoch299.pth",
            "timm",
        )
        for size in ("tiny", "small", "base")
    },
    **{
        f"spach/{name}": (
            f"https://github.com/microsoft/SPACH/releases/download/v1.0/{name}.pth",
            "timm",
        )
        for name in ("smlp_s", "smlp_b")
    },
    **{
        f"spach/spach_ms_{file}": (
            "https://github.com/microsoft/SPACH/releases/download/v1.0/"
            f"spach_ms_{file}.pth",
            "timm",
        )
        for file in (
            *("mlp_xxs", "conv_xxs", "trans_xxs", "mlp_s", "conv_s", "trans_s"),
            *("hybrid_s", "hybrid_s+"),
        )
    },
}


def test_the_table_is_the_listing():
    on_the_hub = {name for name in PUBLISHED if name.startswith("timm/")}
    assert set(PUBLISHED) - on_the_hub == {*MIB, *RELEASED}
    assert len(on_the_hub) == 12
    for name in on_the_hub:
        entry, size = PUBLISHED[name], name.removeprefix("timm/").split("_224.")[0]
        assert entry.model == size
        assert entry.num_bytes == pytest.approx(4e6 * HUB_MILLIONS[size], rel=1e-3)
        is_resmlp = size.startswith("resmlp")
        assert entry.preprocess in image_ops.PROTOCOLS
        assert entry.preprocess == ("timm-0.9" if is_resmlp else "timm")
        mean = (0.485, 0.456, 0.406) if is_resmlp else (0.5, 0.5, 0.5)
        assert entry.normalisation.mean == mean


def test_what_authors_have_released_is_what_their_readmes_say(monkeypatch):
    monkeypatch.delenv("MLP_MIXER_AUTHORS_URL", raising=False)
    for name, (address, protocol) in RELEASED.items():
        entry = PUBLISHED[name]
        assert published.download_url(name) == address
        assert (entry.preprocess, entry.normalisation.mean) == (protocol, IMAGENET[0])
        assert "nobody has read here" in entry.note
        assert models.family(entry.model).TOP_1[entry.model]
    monkeypatch.setenv("MLP_MIXER_AUTHORS_URL", "https://mirror.example")
    assert published.download_url("spach/smlp_s") == (
        "https://mirror.example/microsoft/SPACH/releases/download/v1.0/smlp_s.pth"
    )


@pytest.mark.parametrize("name", MIB)
def test_a_listed_size_is_the_models(name):
    entry, rounding = PUBLISHED[name], 0.005 * 2**20
    assert entry.num_bytes == 4 * sum(map(math.prod, shapes(entry).values()))
    assert entry.sizes[0] - rounding <= MIB[name] * 2**20 <= entry.sizes[-1] + rounding


def test_what_we_write_has_a_published_files_size(contents):
    assert len(contents[0]) in TOY.sizes


def test_a_file_says_when_it_is_not_the_papers():
    for name, entry in PUBLISHED.items():
        folder = name.partition("/")[0]
        assert ("not of the Mixer paper" in entry.note) == (folder in ("sam", "gsam"))
        assert ("pre-trained only" in entry.note) == (folder == "imagenet21k")


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(ValueError, match="published; try imagenet1k/Mixer-B_16, "):
        published.fetch("imagenet1k/mixer-B-16")


def test_a_name_is_a_source_of_weights(site, path, contents, caplog):
    """In float32, of a folder that is not there: downloaded, and then not again."""
    weights = pretrained.read(NAME)
    assert not caplog.records  # nothing is assumed of it
    assert (weights.origin, weights.image_size) == ("published", (224, 224))
    assert (weights.model["name"], weights.num_classes) == ("mixer", 7)
    pretrained.load(NAME)
    assert len(site.requests) == 1
    said = "not one of the published names (toy/Mixer-T_32|imagenet1k/Mixer-B_16), "
    with pytest.raises(FileNotFoundError, match=said):
        pretrained.read("imagenet1k/Mixer-B16")


def test_a_file_of_the_hub_is_a_source_of_weights(site, tmp_path, monkeypatch):
    """Its names are timm's, and its normalisation is folded into the stem."""
    row = {"num_blocks": 1, "hidden_dim": 8, "channels_mlp_dim": 8}
    entry = dataclasses.replace(
        PUBLISHED["timm/resmlp_12_224.fb_in1k"], num_classes=7, overrides=row
    )
    name = "timm/resmlp_1_224.fb_in1k"
    monkeypatch.setitem(PUBLISHED, name, entry)
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    rng = np.random.default_rng(0)
    ours = {k: rng.normal(size=x).astype(np.float32) for k, x in shapes(entry).items()}
    theirs = Names(models.resmlp, "timm").with_their_names(ours)
    whole = {k: np.ascontiguousarray(x) for k, x in theirs.items()}
    elsewhere = tmp_path / "elsewhere.safetensors"
    safetensors.numpy.save_file(whole, elsewhere)
    site.content = elsewhere.read_bytes()
    assert len(site.content) in entry.sizes
    # The hub answers with the address of another server.
    site.plans = [{"status": 302, "location": f"{site.url}/cdn"}]
    weights = pretrained.read(name)
    asked = ["/timm/resmlp_1_224.fb_in1k/resolve/main/model.safetensors", "/cdn"]
    assert [path for path, _, _ in site.requests] == asked
    assert (tmp_path / "cache" / f"{name}.safetensors").exists()
    assert (weights.origin, weights.image_size) == ("published", (224, 224))
    assert (weights.preprocess, weights.model["gelu"]) == ("timm-0.9", "exact")
    by_hand = pretrained.read(elsewhere, mean=IMAGENET[0], std=IMAGENET[1])
    for path, array in leaves(weights.params):
        np.testing.assert_array_equal(array, dict(leaves(by_hand.params))[path])
    with pytest.raises(ValueError, match=r"published, and is for mean 0\.485"):
        pretrained.read(name, mean=0.5, std=0.5)
    # Another model's file has another size, or other arrays.
    pathlib.Path(tmp_path / "cache" / f"{name}.safetensors.sha256").unlink()
    whole["blocks.0.ls3"] = whole.pop("blocks.0.ls2")
    safetensors.numpy.save_file(whole, tmp_path / "cache" / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.0\.ls3: got .* expected nothing"):
        published.fetch(name)


@pytest.fixture
def released(site, monkeypatch):
    """(name, entry) of a small model that its authors have released."""
    row = {"num_blocks": (1, 1, 1, 1), "hidden_dim": 2, "mlp_ratio": 1}
    name, entry = "spach/smlp_toy", PUBLISHED["spach/smlp_s"]
    entry = dataclasses.replace(entry, num_classes=7, overrides=row)
    monkeypatch.setitem(PUBLISHED, name, entry)
    monkeypatch.setenv("MLP_MIXER_AUTHORS_URL", site.url)
    return name, entry


def test_a_torch_file_is_a_source_of_weights(released, site, tmp_path):
    """It holds an average besides, and what else a training program saves."""
    torch = pytest.importorskip("torch")
    name, entry = released
    rng = np.random.default_rng(0)
    ours = {k: np.float32(rng.uniform(1, 2, x)) for k, x in entry.shapes.items()}
    names = foreign.names_of(models.smlpnet, "authors", entry.overrides)
    state = {
        k: torch.from_numpy(np.ascontiguousarray(x))
        for k, x in names.with_their_names(ours).items()
    }
    state["batch_norm.num_batches_tracked"] = torch.tensor(9)
    saved = {"model": state, "model_ema": {k: x + 1 for k, x in state.items()}}
    moments = {i: {"exp_avg": x, "exp_avg_sq": x} for i, x in enumerate(state.values())}
    saved["optimizer"] = {"state": moments, "param_groups": [{"lr": 1e-5}]}
    torch.save(saved, tmp_path / "saved.pth")
    site.content = (tmp_path / "saved.pth").read_bytes()
    assert len(site.content) > 2 * entry.num_bytes
    weights = pretrained.read(name)  # of the last step, as its authors evaluate
    ((asked, _, _),) = site.requests
    assert asked == "/microsoft/SPACH/releases/download/v1.0/smlp_s.pth"
    assert (weights.origin, weights.preprocess) == ("published", "timm")
    assert (weights.model["mean"], weights.image_size) == (IMAGENET[0], (224, 224))
    found = dict(leaves(weights.params | weights.stats))
    assert found.keys() == ours.keys()
    for path, array in ours.items():
        np.testing.assert_array_equal(found[path], array)
    averaged = pretrained.read(name, ema=True).stats["batch_stats"]["norm"]["mean"]
    np.testing.assert_array_equal(averaged, ours["batch_stats/norm/mean"] + 1)
    # Another model's file is refused, and what came of it is dropped.
    del state["batch_norm.running_var"]
    torch.save(state, tmp_path / "cache" / f"{name}.pth")
    (tmp_path / "cache" / f"{name}.pth.sha256").unlink()
    with pytest.raises(ValueError, match=r"batch_stats/norm/var: got nothing, expec"):
        published.fetch(name)


def test_without_torch_no_torch_file_is_downloaded(released, site, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match="smlp_toy is a torch file, and torch"
    ):
        pretrained.read(released[0])
    assert not site.requests


# --- Addresses ------------------------------------------------------------------------


def test_the_address_is_the_authors_or_a_mirrors(monkeypatch):
    monkeypatch.delenv("MLP_MIXER_WEIGHTS_URL", raising=False)
    assert published.download_url("imagenet1k/Mixer-B_16") == (
        "https://storage.googleapis.com/mixer_models/imagenet1k/Mixer-B_16.npz"
    )
    monkeypatch.setenv("MLP_MIXER_WEIGHTS_URL", "https://mirror.example/mixer/")
    assert published.download_url("sam/Mixer-B_32") == (
        "https://mirror.example/mixer/sam/Mixer-B_32.npz"
    )
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert published.download_url("timm/gmlp_s16_224.ra3_in1k") == (
        "https://huggingface.co/timm/gmlp_s16_224.ra3_in1k/resolve/main/"
        "model.safetensors"
    )
    monkeypatch.setenv("MLP_MIXER_WEIGHTS_URL", "http://mirror.example")
    with pytest.raises(ValueError, match="expected https"):
        published.download_url("sam/Mixer-B_32")


def test_the_cache_is_where_the_environment_says(monkeypatch):
    for name in ("MLP_MIXER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert files.default_cache_dir() == pathlib.Path("/home/somebody/.cache/mlp_mixer")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/cache")
    assert files.default_cache_dir() == pathlib.Path("/scratch/cache/mlp_mixer")
    monkeypatch.setenv("MLP_MIXER_CACHE", "~/weights")
    assert files.default_cache_dir() == pathlib.Path("/home/somebody/weights")


# --- The download ---------------------------------------------------------------------


def test_a_file_is_downloaded_once(site, path, contents):
    assert published.fetch(NAME) == path
    assert path.read_bytes() == contents[0]
    assert beside(path, ".sha256").read_text() == line(contents[0])
    assert npz.read(path)[0].keys() == shapes(TOY).keys()
    assert published.fetch(NAME) == path
    assert site.requests == [("/toy/Mixer-T_32.npz", None, None)]
    assert sorted(os.listdir(path.parent)) == [
        ".Mixer-T_32.npz.lock",
        "Mixer-T_32.npz",
        "Mixer-T_32.npz.sha256",
    ]


def test_a_cut_download_asks_only_for_the_rest(site, path, contents, monkeypatch):
    half = len(contents[0]) // 2
    site.plans = [{"cut": half}]
    shown = []

    @contextlib.contextmanager
    def progress(what, total, unit, done):
        shown.append([what, total, unit, done])
        yield lambda more: shown[-1].__setitem__(3, shown[-1][3] + more)

    monkeypatch.setattr(console, "counter", progress)
    published.fetch(NAME, waits_s=NOW)
    (_, first, _), (_, second, condition) = site.requests
    assert (first, second) == (None, f"bytes={half}-")
    assert condition == f'"{hashlib.md5(contents[0]).hexdigest()}"'
    assert site.sent == len(contents[0])
    assert path.read_bytes() == contents[0]
    ends = [half, len(contents[0])]
    assert shown == [
        [f"{NAME}: download", len(contents[0]), "bytes", end] for end in ends
    ]


def test_a_later_call_goes_on(site, path, contents):
    half = len(contents[0]) // 2
    site.plans = [{"cut": half}]
    with pytest.raises(FileNotFoundError, match=f"{half:,} bytes are kept"):
        published.fetch(NAME, waits_s=())
    assert not path.exists()
    published.fetch(NAME, waits_s=())
    assert site.ranges == [None, f"bytes={half}-"]
    assert path.read_bytes() == contents[0]


def test_attempts_are_counted_anew_when_something_arrived(site, path, contents):
    site.plans = [{"cut": 1000}] * 9
    published.fetch(NAME, waits_s=(0.0,))
    assert site.ranges == [None, *(f"bytes={i}000-" for i in range(1, 10))]
    assert path.read_bytes() == contents[0]


def test_attempts_end_when_nothing_arrives(site, path):
    site.plans = [{"cut": 0}] * 9
    with pytest.raises(FileNotFoundError, match="cut at 0 of"):
        published.fetch(NAME, waits_s=NOW)
    assert len(site.requests) == 1 + len(NOW)
    assert not path.exists()


def test_a_part_of_a_changed_file_is_dropped(site, path, contents):
    half = len(contents[0]) // 2
    site.plans = [{"cut": half}]
    with pytest.raises(FileNotFoundError):
        published.fetch(NAME, waits_s=())
    site.content = contents[1]
    published.fetch(NAME, waits_s=())
    assert site.ranges == [None, f"bytes={half}-"]  # Refused by its If-Range.
    assert path.read_bytes() == contents[1]


def test_a_server_that_overlooks_the_change_is_noticed(site, path, contents):
    site.plans = [{"cut": 1000}, {"blind": True}]
    with pytest.raises(FileNotFoundError):
        published.fetch(NAME, waits_s=())
    site.content = contents[1]
    published.fetch(NAME, waits_s=NOW)
    assert site.ranges == [None, "bytes=1000-", None]
    assert path.read_bytes() == contents[1]


@pytest.mark.parametrize("etag", [None, 'W/"1"'])
def test_without_a_strong_etag_a_download_begins_anew(site, path, contents, etag):
    site.plans = [{"cut": 1000, "etag": etag}]
    published.fetch(NAME, waits_s=NOW)
    assert site.ranges == [None, None]
    assert path.read_bytes() == contents[0]


def test_without_ranges_a_download_begins_anew(site, path, contents):
    site.plans = [{"cut": 1000}, {"ranges": False}]
    published.fetch(NAME, waits_s=NOW)
    assert site.ranges == [None, "bytes=1000-"]
    assert site.sent == 1000 + len(contents[0])
    assert path.read_bytes() == contents[0]


def test_a_range_that_does_not_exist_begins_anew(site, path, contents):
    site.plans = [{"cut": 1000}, {"status": 416}]
    published.fetch(NAME, waits_s=NOW)
    assert site.ranges == [None, "bytes=1000-", None]
    assert path.read_bytes() == contents[0]


def test_a_note_cut_in_the_writing_begins_anew(site, path, contents):
    site.plans = [{"cut": 1000}]
    with pytest.raises(FileNotFoundError):
        published.fetch(NAME, waits_s=())
    beside(path, ".part.json").write_text('{"etag": "\\"')
    published.fetch(NAME, waits_s=())
    assert site.ranges == [None, None]
    assert path.read_bytes() == contents[0]


def test_a_whole_part_needs_no_network(site, path, contents, monkeypatch):
    """Killed between the last byte and the name."""
    with monkeypatch.context() as patch:
        patch.setattr(downloads.Part, "rename", lambda part, path: None)
        published.fetch(NAME)
    assert not path.exists()
    published.fetch(NAME)
    assert site.ranges == [None]
    assert path.read_bytes() == contents[0]


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_server_is_asked_again(site, path, contents, status):
    site.plans = [{"status": status}, {"status": status}]
    published.fetch(NAME, waits_s=NOW)
    assert len(site.requests) == 3
    assert path.read_bytes() == contents[0]


@pytest.mark.parametrize("status", [403, 404])
def test_a_file_that_is_not_there_is_one_error(site, path, status):
    site.plans = [{"status": status}]
    with pytest.raises(FileNotFoundError) as error:
        published.fetch(NAME, waits_s=NEVER)
    assert f"{site.url}/{NAME}.npz: {status} " in str(error.value)
    assert f"put it there: {path}" in str(error.value)


def test_no_network_is_one_error(site, path, offline):
    with pytest.raises(FileNotFoundError) as error:
        published.fetch(NAME, waits_s=NEVER)
    assert f"{offline}/{NAME}.npz" in str(error.value)
    assert "Connection refused" in str(error.value)
    assert f"put it there: {path}" in str(error.value)
    assert "MLP_MIXER_WEIGHTS_URL" in str(error.value)


def test_a_network_that_goes_away_is_waited_for(site, path, offline, contents):
    """Who has a part has had a network."""
    put(beside(path, ".part"), contents[0][:1000])
    beside(path, ".part.json").write_text('{"etag": "\\"1\\"", "size": 10000}')
    with pytest.raises(ValueError, match="sleep length"):
        published.fetch(NAME, waits_s=NEVER)


def test_a_strangers_certificate_is_not_trusted(site, path, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(FileNotFoundError, match=r"CERTIFICATE_VERIFY_FAILED.*SSL_CERT"):
        published.fetch(NAME, waits_s=NEVER)
    assert site.requests == []


def test_a_redirection_may_not_leave_https(site, path):
    site.plans = [{"status": 302, "location": "http://localhost:1/"}]
    with pytest.raises(FileNotFoundError, match="unknown url type: http"):
        published.fetch(NAME, waits_s=NEVER)


def test_a_redirection_is_followed(site, path, contents):
    site.plans = [{"status": 302, "location": f"{site.url}/elsewhere"}]
    published.fetch(NAME, waits_s=NEVER)
    assert [where for where, _, _ in site.requests] == [f"/{NAME}.npz", "/elsewhere"]
    assert path.read_bytes() == contents[0]


@pytest.mark.parametrize("length", [TOY.sizes[0] - 1, TOY.sizes[-1] + 1])
def test_an_impossible_size_is_refused_before_the_download(site, path, length):
    site.plans = [{"length": length}]
    where = f"{site.url}/{NAME}.npz"
    with pytest.raises(ValueError, match=f"^{where} has {length:,} bytes") as error:
        published.fetch(NAME, waits_s=NEVER)
    assert f"{TOY.sizes[0]:,} (the parameters) to {TOY.sizes[-1]:,}" in str(error.value)
    assert not beside(path, ".part").exists()


def test_a_size_that_is_not_said_is_refused(site, path):
    site.plans = [{"length": None}]
    with pytest.raises(ValueError, match="does not say how long"):
        published.fetch(NAME, waits_s=NEVER)
    assert not beside(path, ".part").exists()


def test_a_full_disk_is_known_before_the_download(site, path, monkeypatch):
    usage = shutil.disk_usage(path.anchor)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="Make room"):
        published.fetch(NAME, waits_s=NEVER)
    assert beside(path, ".part").stat().st_size == 0


# --- Servers that do not mean well ----------------------------------------------------


def failed(error):
    """What it says, which is one line that no terminal obeys."""
    said = str(error.value)
    assert said.isprintable()
    return said


def test_a_server_of_some_bytes_a_second_is_given_up_and_continued(
    site, path, contents, monkeypatch
):
    monkeypatch.setattr(downloads, "WINDOW_SECONDS", 0.3)
    site.plans = [{"drip": True}] * 20
    with pytest.raises(FileNotFoundError, match="less than 4,096") as error:
        published.fetch(NAME, waits_s=NOW)
    assert len(site.requests) == 1 + len(NOW)
    kept = beside(path, ".part").stat().st_size
    assert kept > 0
    assert f"({kept:,} bytes are kept)" in failed(error)
    site.plans = []
    published.fetch(NAME, waits_s=())
    assert site.ranges[-1] == f"bytes={kept}-"
    assert path.read_bytes() == contents[0]


def test_a_server_that_is_slow_for_a_while_is_not_given_up(
    site, path, contents, monkeypatch
):
    monkeypatch.setattr(downloads, "WINDOW_SECONDS", 0.3)
    site.plans = [{"drip": True}, {}]
    published.fetch(NAME, waits_s=NOW)
    assert path.read_bytes() == contents[0]


def test_an_answer_that_never_begins_is_given_up(site, path, monkeypatch):
    """Each byte of its headers comes in time."""
    monkeypatch.setattr(downloads, "TIMEOUT_SECONDS", 1.0)
    site.plans = [{"trickle": True}] * 2
    with pytest.raises(FileNotFoundError, match="no whole answer in 1 s") as error:
        published.fetch(NAME, waits_s=(0.0,))
    assert len(site.requests) == 2
    assert failed(error)


def test_a_server_that_always_closes_early_is_given_up(site, path, monkeypatch):
    monkeypatch.setattr(downloads, "MAX_ATTEMPTS", 5)
    site.plans = [{"cut": 1}] * 20
    with pytest.raises(FileNotFoundError, match=r"at attempt 5\. .*5 bytes are kept"):
        published.fetch(NAME, waits_s=(0.0,))
    assert len(site.requests) == 5


def test_a_redirection_to_itself_ends(site, path):
    site.plans = [{"status": 302, "location": f"{site.url}/again"}] * 50
    with pytest.raises(FileNotFoundError, match="infinite loop") as error:
        published.fetch(NAME, waits_s=NEVER)
    assert failed(error)
    assert len(site.requests) < 15


def test_a_redirection_is_followed_though_it_says_more_without_end(
    site, path, contents
):
    began = time.monotonic()
    site.plans = [
        {
            "status": 302,
            "location": f"{site.url}/elsewhere",
            "endless": True,
            "length": None,
        }
    ]
    published.fetch(NAME, waits_s=NEVER)
    assert time.monotonic() - began < 10
    assert path.read_bytes() == contents[0]


def test_a_download_in_chunks_does_not_say_its_size(site, path):
    site.plans = [{"chunked": True}]
    with pytest.raises(ValueError, match="does not say how long"):
        published.fetch(NAME, waits_s=NEVER)


def test_a_length_that_is_too_long_ends(site, path, contents):
    site.plans = [{"length": len(contents[0]) + 5}]
    site.content = contents[0]
    site.plans *= 2
    with pytest.raises(FileNotFoundError, match=r"cut at|another part"):
        published.fetch(NAME, waits_s=())
    published.fetch(NAME, waits_s=NOW)
    assert path.read_bytes() == contents[0]


def npz_of(change, folder):
    """The bytes of an npz of TOY's parameters, of which some are changed."""
    rng = np.random.default_rng(0)
    arrays = {k: rng.normal(size=x).astype(np.float32) for k, x in shapes(TOY).items()}
    change(arrays)
    np.savez(folder / "changed.npz", **arrays)
    return (folder / "changed.npz").read_bytes()


def one_infinite_value(arrays):
    arrays["stem/kernel"][1, 2, 0, 3] = np.inf


def one_that_is_no_number(arrays):
    arrays["head/bias"][2] = np.nan


def another_model(arrays):
    name = "MixerBlock_1/channel_mixing/Dense_"
    arrays[f"{name}0/kernel"] = arrays[f"{name}0/kernel"].T


def another_name(arrays):
    arrays["head/scale"] = arrays.pop("head/bias")


def whole_numbers(arrays):
    arrays["stem/bias"] = arrays["stem/bias"].astype(np.int32)


def padded(start):
    return lambda folder: start.ljust(TOY.sizes[0] + 5000, b" ")


def changed(change):
    return lambda folder: npz_of(change, folder)


IMPOSTORS = {
    "a page": (padded(b"<!DOCTYPE html><title>Log in</title>"), "not a whole npz"),
    "zeros": (padded(bytes(10)), "not a whole npz file"),
    "an infinite value": (changed(one_infinite_value), "stem/kernel: values are inf"),
    "no number": (changed(one_that_is_no_number), "head/bias: values are infinite or"),
    "another model": (
        changed(another_model),
        r"Dense_0/kernel: got \(\(128, 64\), 'float",
    ),
    "another name": (
        changed(another_name),
        r"head/bias: got nothing, expected \(\(7,\),",
    ),
    "whole numbers": (
        changed(whole_numbers),
        r"stem/bias: got \(\(64,\), 'int32'\), exp",
    ),
}


@pytest.mark.parametrize("kind", IMPOSTORS)
def test_what_has_only_the_size_is_not_recorded(kind, site, path, contents, tmp_path):
    make, said = IMPOSTORS[kind]
    site.content = make(tmp_path)
    assert len(site.content) in TOY.sizes
    with pytest.raises(ValueError, match=said) as error:
        published.fetch(NAME, waits_s=NEVER)
    assert f"What {site.url}/{NAME}.npz sent is dropped" in str(error.value)
    assert os.listdir(path.parent) == [".Mixer-T_32.npz.lock"]
    put(path, site.content)  # by hand it is no better
    with pytest.raises(ValueError, match=said):
        published.fetch(NAME, waits_s=NEVER)
    assert not beside(path, ".sha256").exists()
    path.unlink()
    site.content = contents[0]
    assert published.fetch(NAME).read_bytes() == contents[0]


def test_a_length_that_is_too_short_is_no_download(site, path):
    site.plans = [{"length": TOY.sizes[0] + 10}]
    with pytest.raises(ValueError, match=r"sent is dropped: .* not a whole npz"):
        published.fetch(NAME, waits_s=NEVER)
    assert not path.exists()


RECORDS = {
    "empty": b"",
    "a word": b"good\n",
    "cut": b"ab" * 20,
    "another file's": b"ab" * 32 + b"  Mixer-B_16.npz\n",
    "two lines": (b"ab" * 32 + b"  Mixer-T_32.npz\n") * 2,
    "no text": bytes(range(256)),
    "much": b"a" * 10**6,
    "a command to the terminal": b"\x1b[31m",
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_damaged_record_is_named(kind, site, path, contents):
    put(path, contents[0])
    beside(path, ".sha256").write_bytes(RECORDS[kind])
    with pytest.raises(ValueError, match=r"Mixer-T_32\.npz\.sha256") as error:
        published.fetch(NAME, waits_s=NEVER)
    assert failed(error)
    assert path.read_bytes() == contents[0]
    assert site.requests == []


@pytest.mark.parametrize("form", ["{0}  {1}\n", "{0} *{1}\n", "{0}\n", "{0}"])
def test_a_record_may_be_written_by_sha256sum_or_by_hand(form, site, path, contents):
    put(path, contents[0])
    known = hashlib.sha256(contents[0]).hexdigest()
    beside(path, ".sha256").write_text(form.format(known, path.name))
    assert published.fetch(NAME, waits_s=NEVER) == path


def test_a_place_where_nothing_can_be_kept_is_named(site, path, contents, monkeypatch):
    put(path, contents[0])
    beside(path, ".sha256").mkdir()
    with pytest.raises(OSError, match=r"npz\.sha256 cannot be read: Is a directory"):
        published.fetch(NAME, waits_s=NEVER)
    path.unlink()
    beside(path, ".sha256").rmdir()
    beside(path, ".part").mkdir()
    with pytest.raises(OSError, match=r"cannot be kept: .*\.part: Is a directory"):
        published.fetch(NAME, waits_s=NEVER)
    monkeypatch.setenv("MLP_MIXER_CACHE", str(path.parents[2] / "ca.pem"))
    with pytest.raises(OSError, match=r"cannot be kept: .*ca\.pem.*: Not a directory"):
        published.fetch(NAME, waits_s=NEVER)


NOTES = [
    *("", "[]", "3", "null", "{}", '{"etag": 1, "size": 1}', "[" * 100_000, "\0\0"),
    *('{"etag": "\\"1\\"", "size": "1"}', '{"etag": "\\"1\\"", "size": -5}'),
    '{"etag": "\\"1\\"\\r\\nX-Other: 1", "size": 1000000}',
    '{"etag": "\\"1\\"", "size": 1000, "size": 1000000}',
]


@pytest.mark.parametrize("note", NOTES)
def test_a_damaged_note_begins_anew(note, site, path, contents):
    put(beside(path, ".part"), contents[1][:1000])
    beside(path, ".part.json").write_text(note)
    published.fetch(NAME, waits_s=NOW)
    assert path.read_bytes() == contents[0]


# --- The cache ------------------------------------------------------------------------


def test_a_changed_file_is_refused(site, path, contents):
    published.fetch(NAME)
    changed = bytearray(contents[0])
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=f"Try again without {path}") as error:
        published.fetch(NAME)
    assert hashlib.sha256(changed).hexdigest() in str(error.value)
    assert hashlib.sha256(contents[0]).hexdigest() in str(error.value)
    path.unlink()
    assert published.fetch(NAME).read_bytes() == contents[0]


def test_a_shortened_file_is_refused(site, path, contents):
    published.fetch(NAME)
    path.write_bytes(contents[0][:1000])
    with pytest.raises(ValueError, match=f"has 1,000 bytes, .*: remove {path}"):
        published.fetch(NAME)


def test_a_download_is_what_was_recorded_before(site, path, contents):
    published.fetch(NAME)
    path.unlink()
    site.content = contents[1]
    with pytest.raises(ValueError, match=r"without that record"):
        published.fetch(NAME)
    assert not path.exists()
    assert not beside(path, ".part").exists()
    beside(path, ".sha256").unlink()
    assert published.fetch(NAME).read_bytes() == contents[1]
    assert beside(path, ".sha256").read_text() == line(contents[1])


def test_a_file_put_by_hand_is_recorded(site, path, contents, offline):
    put(path, contents[0])
    assert published.fetch(NAME) == path
    assert beside(path, ".sha256").read_text() == line(contents[0])
    path.write_bytes(contents[1])
    with pytest.raises(ValueError, match="SHA-256"):
        published.fetch(NAME)


def test_a_wrong_file_put_by_hand_is_refused(site, path, contents, offline):
    put(path, contents[0][:-30_000])
    with pytest.raises(ValueError, match=f"remove {path} and try again"):
        published.fetch(NAME)
    assert not beside(path, ".sha256").exists()


def test_a_read_only_cache_is_only_read(site, path, contents):
    put(path, contents[0])
    beside(path, ".sha256").write_text(line(contents[0]))
    before = sorted(os.listdir(path.parent))
    published.fetch(NAME)
    assert sorted(os.listdir(path.parent)) == before


# --- Several processes ----------------------------------------------------------------

CHILD = f"""
import logging
logging.basicConfig(level=logging.INFO)
from mlp_mixer.pretrained import published
published.PUBLISHED[{NAME!r}] = published.Published(
    {TOY.model!r}, {TOY.num_classes}, {dict(TOY.overrides)!r}
)
print(published.fetch({NAME!r}))
"""


@pytest.fixture
def child():
    """Starts another process that fetches; it ends with the test at the latest."""
    started = []

    def start():
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", CHILD],
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_several_processes_download_once(site, path, contents, child):
    site.plans = [{"hold": 1000}]
    here = threading.Thread(target=published.fetch, args=(NAME,))
    here.start()
    assert site.holding.wait(60)
    process = child()
    said = next((text for text in process.stderr if "waiting for it" in text), "")
    assert "Another process downloads" in said
    site.go.set()
    here.join()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output == f"{path}\n"
    assert site.ranges == [None]
    assert path.read_bytes() == contents[0]


def test_a_killed_download_is_continued(site, path, contents, child):
    half = len(contents[0]) // 2
    site.plans = [{"hold": half}]
    process = child()
    assert site.holding.wait(120)
    part = beside(path, ".part")
    while not part.exists() or part.stat().st_size < half // 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.wait()
    have = part.stat().st_size
    published.fetch(NAME, waits_s=())
    assert site.ranges == [None, f"bytes={have}-"]
    assert path.read_bytes() == contents[0]
