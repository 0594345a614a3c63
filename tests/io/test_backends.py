"""One face over what runs models: the same answers from each, and none from a device that was not asked for.

The files in golden/ hold one network with the same weights: in ONNX, in TFLite as float, with an open batch, in int8
and in uint8 (golden/make_tflite.py makes them).
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from batchproc import cli
from batchproc.errors import ModelError
from batchproc.io.backends import CPU, CUDA, EDGETPU, LITERT, litert, open_backend, provider_for
from batchproc.io.backends.batches import in_batches
from batchproc.io.cards import InputCard, ModelCard, read_card
from batchproc.io.model_checks import add_model, check_model
from batchproc.io.models import file_hash, load_model
from batchproc.io.quantise import quantise_model

GOLDEN = Path(__file__).parent / "golden"
needs_litert = pytest.mark.skipif(
    not importlib.util.find_spec("ai_edge_litert"), reason="needs ai-edge-litert (extra 'litert')"
)


@pytest.fixture(autouse=True)
def own_models(tmp_path, monkeypatch):
    """No test sees, or touches, the models of whoever runs it."""
    monkeypatch.setenv("BATCHPROC_MODELS", str(tmp_path / "models"))


@pytest.fixture
def make(tmp_path):
    """A model folder from variant → name of a golden file; the first variant is the default."""

    def make(default_layout="NCHW", **variants):
        folder = tmp_path / "small"
        folder.mkdir(exist_ok=True)
        files = {}
        for variant, name in variants.items():
            shutil.copy(GOLDEN / name, folder)
            files[variant] = {"path": name, "sha256": file_hash(folder / name)}
            if name.endswith(".tflite"):
                files[variant]["layout"] = "NHWC"
        card = ModelCard(
            name="small",
            version="1",
            description="A convolution, a dense layer, a sigmoid.",
            licence="BSD-3-Clause",
            threshold=0.5,
            default_variant=next(iter(variants)),
            input=InputCard(size=5, normalisation="none", layout=default_layout),
            files=files,
        )
        (folder / "card.toml").write_text(card.to_toml())
        return folder

    return make


def stamps_of(n=11, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 3, 7, 7)).astype(np.float32)


def answer_of(name, provider, tensor):
    return open_backend(str(GOLDEN / name), file_hash(GOLDEN / name), 1, provider).run([tensor])


# --- The same answers -------------------------------------------------------------------------------------------------


@needs_litert
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("small.tflite", 1e-6),  # a batch of 4: the last one is filled up
        ("small_any.tflite", 1e-6),  # any batch
        ("small_int8.tflite", 0.02),  # a batch of 1
        ("small_uint8.tflite", 0.02),  # a batch of 4
    ],
)
@pytest.mark.parametrize("n", [1, 3, 4, 11])
def test_litert_answers_as_onnx_runtime_does(name, tolerance, n):
    """In float to the last digits, in 8 bits within some steps of 1/256; one row a stamp, whatever the batch."""
    stamps = np.random.default_rng(n).normal(size=(n, 3, 5, 5)).astype(np.float32)
    expected = answer_of("small.onnx", CPU, stamps)
    found = answer_of(name, LITERT, np.ascontiguousarray(stamps.transpose(0, 2, 3, 1)))
    assert (found.shape, found.dtype) == ((n, 1), np.float32)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@needs_litert
def test_int8_and_uint8_are_the_same_numbers():
    """The integers inside are the same; only their ends are moved by 128."""
    tensor = np.random.default_rng(2).normal(size=(8, 5, 5, 3)).astype(np.float32)
    whole = answer_of("small_int8.tflite", LITERT, tensor)
    np.testing.assert_array_equal(answer_of("small_uint8.tflite", LITERT, tensor), whole)
    np.testing.assert_array_equal(whole * 256, np.rint(whole * 256))


@needs_litert
def test_variants_of_one_card_agree_whatever_their_layout(make):
    """Channels first in ONNX and last in TFLite, said on the card; blanks are not scored by either."""
    folder = make(float="small.onnx", tflite="small.tflite", int8="small_int8.tflite")
    stamps = stamps_of()
    stamps[3] = np.nan
    scores = {variant: load_model(folder, variant=variant).predict(stamps) for variant in read_card(folder).files}
    assert np.isnan(scores["int8"]).tolist() == [k == 3 for k in range(len(stamps))]
    np.testing.assert_allclose(scores["tflite"], scores["float"], atol=1e-6)
    np.testing.assert_allclose(scores["int8"], scores["float"], atol=0.02)
    np.testing.assert_array_equal(load_model(folder, variant="tflite").predict(stamps, batch=3), scores["tflite"])
    assert load_model(folder, variant="int8").provider == LITERT


@needs_litert
def test_features_find_their_input_in_whatever_order_the_file_has_them():
    """Several classes, and the batch changes from call to call."""
    rng = np.random.default_rng(3)
    for n in (5, 2, 5):
        given = [rng.normal(size=(n, 5, 5, 3)).astype(np.float32), rng.normal(size=(n, 2)).astype(np.float32)]
        found, expected = (
            open_backend(str(GOLDEN / name), file_hash(GOLDEN / name), 1, provider).run(given)
            for name, provider in (("classes.tflite", LITERT), ("classes.onnx", CPU))
        )
        assert found.shape == (n, 3)
        np.testing.assert_allclose(found, expected, atol=1e-6)


@needs_litert
def test_an_interpreter_is_shared_by_threads():
    """They wait for each other, and none sees another's numbers."""
    tensors = [np.random.default_rng(k).normal(size=(9, 5, 5, 3)).astype(np.float32) for k in range(8)]
    expected = [answer_of("small_any.tflite", LITERT, tensor) for tensor in tensors]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda tensor: answer_of("small_any.tflite", LITERT, tensor), tensors * 20))
    for k, answer in enumerate(found):
        np.testing.assert_array_equal(answer, expected[k % 8])


@needs_litert
def test_a_backend_is_made_once_a_process():
    """As sessions are."""
    name = GOLDEN / "small.tflite"
    assert open_backend(str(name), file_hash(name), 1, LITERT) is open_backend(str(name), file_hash(name), 1, LITERT)


def test_a_fixed_batch_is_filled_and_its_filling_dropped():
    """`call` sees full batches only, zeros at the end of the last."""
    seen = []

    def call(tensors):
        seen.append(tensors[0])
        return tensors[0].sum(axis=1)

    tensor = np.arange(10, dtype=np.float32).reshape(5, 2)
    np.testing.assert_array_equal(in_batches(call, [tensor], 3), tensor.sum(axis=1, keepdims=True))
    assert [each.shape for each in seen] == [(3, 2), (3, 2)]
    assert not seen[1][2].any()
    with pytest.raises(ModelError, match=r"fixed batch of 3 stamps answered \(2,\)"):
        in_batches(lambda tensors: np.zeros(2, np.float32), [tensor], 3)


# --- Files that do not fit --------------------------------------------------------------------------------------------


@needs_litert
@pytest.mark.parametrize(("name", "layout"), [("small.onnx", "NHWC"), ("small.tflite", "NCHW")])
def test_another_layout_than_the_card_says_is_refused(make, name, layout):
    """With both shapes, before anything is computed."""
    folder = make(float=name)
    text = (folder / "card.toml").read_text().replace('"NCHW"', '"?"').replace('"NHWC"', '"?"')
    (folder / "card.toml").write_text(text.replace('"?"', f'"{layout}"'))
    with pytest.raises(ModelError, match=r"input stamps takes \(n, .*\), its card leads to \(n, .*\). Correct size"):
        load_model(folder).predict(stamps_of())


@needs_litert
def test_what_is_no_tflite_file_is_an_error_of_ours(tmp_path):
    """Not one of LiteRT's."""
    path = tmp_path / "x.tflite"
    path.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"x\.tflite: ai_edge_litert\.interpreter cannot load it"):
        open_backend(str(path), file_hash(path), 1, LITERT)


def test_quantising_starts_from_onnx(make):
    """And says what there is."""
    with pytest.raises(ModelError, match=r"no float variant in ONNX to start from; there are: float \(small.tflite\)"):
        quantise_model(make(float="small.tflite"), stamps_of())


# --- No silent fall-back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "providers"),
    [
        ("small.onnx", (CPU, CUDA, None)),
        ("small.tflite", (LITERT, None, None)),
        ("edgetpu.tflite", (None, None, EDGETPU)),
    ],
)
def test_the_file_says_where_it_runs(name, providers):
    """By its suffix, and for the Edge TPU by whether it is compiled."""
    assert tuple(provider_for(GOLDEN / name, device) for device in ("cpu", "gpu", "edgetpu")) == providers


@needs_litert
def test_a_device_takes_the_variant_that_runs_on_it(make):
    """The default one where it does, else the first that does."""
    folder = make(int8="small_int8.tflite", tpu="edgetpu.tflite", float="small.onnx")
    found = {device: load_model(folder, device=device).variant for device in ("cpu", "gpu", "edgetpu")}
    assert found == {"cpu": "int8", "gpu": "float", "edgetpu": "tpu"}


@pytest.mark.parametrize(
    ("device", "name", "message"),
    [
        ("gpu", "small.tflite", r"device = 'gpu': found float \(small.tflite\); expected an .onnx file"),
        ("edgetpu", "small.onnx", r"found float \(small.onnx\); expected a .tflite file from edgetpu_compiler"),
        ("edgetpu", "small_int8.tflite", "expected a .tflite file from edgetpu_compiler"),
        ("cpu", "edgetpu.tflite", "not compiled for the Edge TPU"),
        ("tpu", "small.onnx", "expected cpu, gpu or edgetpu"),
    ],
)
def test_a_device_that_no_variant_is_for_is_refused(make, device, name, message):
    """Where the model is loaded, before anything is computed."""
    with pytest.raises(ModelError, match=message):
        load_model(make(float=name), device=device)
    with pytest.raises(ModelError, match=message):
        load_model(make(float=name), device=device, variant="float")


def test_a_gpu_that_is_not_there_is_not_the_cpu(make):
    """The plain ONNX Runtime has no CUDA: said, with the lines that bring it."""
    with pytest.raises(ModelError, match=r"provider CUDAExecutionProvider is not in .*pip install onnxruntime-gpu"):
        load_model(make(float="small.onnx"), device="gpu").predict(stamps_of())


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_a_provider_that_fails_is_not_the_cpu(make, monkeypatch):
    """ONNX Runtime then goes on with the CPU and a warning; here it is an error."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    with pytest.raises(ModelError, match="asked for CUDAExecutionProvider, ONNX Runtime uses CPUExecutionProvider"):
        load_model(make(float="small.onnx"), device="gpu").predict(stamps_of())


def test_operators_that_a_provider_leaves_to_the_cpu_are_refused(make):
    """ONNX Runtime says that the provider is in use, and computes on the CPU what it has no kernel for."""
    import onnxruntime

    azure = "AzureExecutionProvider"  # has no kernel for anything that a network is made of
    if azure not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no provider that lacks operators")
    with pytest.raises(ModelError, match=rf"asked for {azure}, which has no kernel .* × Conv.* on the CPU") as error:
        load_model(make(float="small.onnx"), provider=azure).predict(stamps_of())
    assert 'device = "cpu"' in str(error.value)


def test_two_onnx_runtimes_in_one_place_are_refused(make, tmp_path, monkeypatch):
    """Before anything is scored, with the two lines that mend it."""
    folder = make(float="small.onnx")
    info = tmp_path / "site" / "onnxruntime_gpu-1.22.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.22.0\n")
    load_model(folder)
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(ModelError) as error:
        load_model(folder)
    assert "onnxruntime-gpu 1.22.0 in one environment" in str(error.value)
    assert str(error.value).splitlines()[1:] == [
        "  pip uninstall onnxruntime onnxruntime-gpu",
        "  pip install onnxruntime-gpu",
    ]


def test_without_litert_a_tflite_file_is_refused_on_loading(make, monkeypatch):
    """With what to install."""
    monkeypatch.setattr(litert, "_RUNTIMES", ("no_such_package",))
    with pytest.raises(
        ModelError, match=r"needs ai-edge-litert or tflite-runtime: .*pip install 'batchproc\[litert\]'"
    ):
        load_model(make(float="small.tflite"))
    with pytest.raises(ModelError, match="No module named 'no_such_package'"):
        litert.load_runtime("x.tflite")


@needs_litert
def test_tflite_runtime_does_as_well(monkeypatch):
    """The forerunner has the same interface; it is taken where it is what there is."""
    from ai_edge_litert import interpreter

    monkeypatch.setitem(sys.modules, "tflite_runtime", SimpleNamespace(interpreter=interpreter))
    monkeypatch.setitem(sys.modules, "tflite_runtime.interpreter", interpreter)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    data = (GOLDEN / "small.tflite").read_bytes()
    backend = litert.LiteRTBackend("small.tflite", data, 1)
    assert backend.run([np.zeros((2, 5, 5, 3), np.float32)]).shape == (2, 1)


# --- Edge TPU ---------------------------------------------------------------------------------------------------------


@needs_litert
def test_without_its_library_the_edge_tpu_is_refused(make, monkeypatch):
    """Nothing is computed elsewhere instead."""
    monkeypatch.setattr(litert, "DELEGATE", "libedgetpu_that_is_not_there.so.1")
    folder = make(float="small.onnx", tpu="edgetpu.tflite")
    with pytest.raises(ModelError, match=r"libedgetpu_that_is_not_there.so.1 cannot be loaded .*libedgetpu1-std"):
        load_model(folder, device="edgetpu").predict(stamps_of())
    with pytest.raises(ModelError, match="cannot be loaded"):
        check_model(folder, "edgetpu")


@needs_litert
@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_without_a_device_the_edge_tpu_is_refused(make, monkeypatch, tmp_path):
    """The library is there and finds nothing plugged in: it hands out no delegate."""
    source = tmp_path / "delegate.c"
    source.write_text(
        "void *tflite_plugin_create_delegate(char **k, char **v, unsigned long n, void (*report)(const char *))"
        '{ report("no device found"); return 0; }\n'
        "void tflite_plugin_destroy_delegate(void *delegate) {}\n"
    )
    library = tmp_path / "libedgetpu.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setattr(litert, "DELEGATE", str(library))
    with pytest.raises(ModelError, match=r"no Edge TPU answers \(.*no device found\)"):
        load_model(make(tpu="edgetpu.tflite"), device="edgetpu").predict(stamps_of())


@needs_litert
def test_a_compiled_file_is_run_with_its_delegate_and_by_nothing_else(make, monkeypatch):
    """A stand-in for the device: it computes what the file was compiled from."""
    from ai_edge_litert import interpreter

    def compiled(model_content, num_threads, experimental_delegates):
        assert experimental_delegates == [("delegate", litert.DELEGATE)]
        return interpreter.Interpreter(model_content=(GOLDEN / "small_int8.tflite").read_bytes())

    runtime = SimpleNamespace(load_delegate=lambda name: ("delegate", name), Interpreter=compiled)
    monkeypatch.setattr(litert, "load_runtime", lambda file: runtime)
    monkeypatch.setattr(litert.ctypes, "CDLL", lambda name: None)
    model = load_model(make(tpu="edgetpu.tflite"), device="edgetpu")
    scores = model.predict(stamps_of())
    monkeypatch.undo()
    assert model.provider == EDGETPU
    np.testing.assert_array_equal(scores, load_model(make(int8="small_int8.tflite")).predict(stamps_of()))


@needs_litert
def test_a_file_for_the_cpu_is_not_given_to_the_edge_tpu():
    """Its operators would all run on the CPU, beside an idle device; nor the other way round."""
    with pytest.raises(ModelError, match=r"found a file not compiled for the Edge TPU; expected what edgetpu_compiler"):
        answer_of("small_int8.tflite", EDGETPU, np.zeros((1, 5, 5, 3), np.float32))
    with pytest.raises(ModelError, match=r'found a file compiled for the Edge TPU; expected .* device = "edgetpu"'):
        answer_of("edgetpu.tflite", LITERT, np.zeros((1, 5, 5, 3), np.float32))


@needs_litert
@pytest.mark.parametrize(
    ("name", "problems"),
    [
        ("small.tflite", "tensors of float32 in CONV_2D, FULLY_CONNECTED, LOGISTIC.*; input stamps has a batch of 4"),
        ("small_any.tflite", "an open batch, expected 1"),
        ("small_hard.tflite", "operators that it does not have: ABS;"),
        ("small_uint8.tflite", "input outer_stamps has a batch of 4, expected 1;"),
        ("small.onnx", r"found no \.tflite file; expected int8 from end to end"),
    ],
)
def test_why_the_compiler_would_not_take_a_file(make, name, problems):
    """Types, operators, batch: each by name."""
    with pytest.raises(ModelError, match=problems):
        check_model(make(float=name), "edgetpu")


@needs_litert
def test_a_file_that_the_compiler_would_take(make, capsys):
    """Said with what to do next; the verb prints it."""
    folder = make(float="small.onnx", int8="small_int8.tflite")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["models", "check", str(folder), "--device", "edgetpu"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.splitlines() == [
        "int8: small_int8.tflite is all of 8 bits, batch 1, 3 operators that the Edge TPU has "
        "(CONV_2D, FULLY_CONNECTED, LOGISTIC), not compiled yet",
        f"to run it there: edgetpu_compiler {folder}/small_int8.tflite; then put what that writes on the card as a "
        "variant",
    ]


@needs_litert
def test_what_is_not_for_this_device_is_not_run(make):
    """A model with a variant for the Edge TPU can be checked, and added, where there is none."""
    folder = make(float="small.onnx", int8="small_int8.tflite", tpu="edgetpu.tflite")
    lines = check_model(folder)
    assert lines[:3] == [
        "float: small.onnx is the file on the card, runs on CPUExecutionProvider",
        "int8: small_int8.tflite is the file on the card, runs on LiteRT",
        "tpu: edgetpu.tflite is the file on the card, is not for cpu: not run",
    ]
    assert lines[3].startswith("int8: differs from float by at most ")
    assert load_model(add_model(folder), variant="int8").provider == LITERT
