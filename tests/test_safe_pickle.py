"""Pickles are read, never run: what torch.save and pickle write comes back, whatever else they hold is refused."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
import subprocess
import tempfile
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="export needs the export extra")

import torch

from export.errors import ExportError
from export.readers.safe_pickle import Global, Inert, load_plain, load_torch

FEW = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MANY_BYTES = 1 << 40


class Runs:
    """Leaves a file behind when somebody runs what its pickle says."""

    def __init__(self, marker: Path, function: Callable[..., Any] = os.system) -> None:
        self.marker, self.function = marker, function

    def __reduce__(self) -> Any:
        return self.function, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists(), "something was run"


def save(path: Path, document: Any) -> Path:
    torch.save(document, path)
    return path


def plain(path: Path, data: bytes) -> Any:
    path.write_bytes(data)
    return load_plain(path)


def refusal(path: Path, data: bytes) -> str:
    with pytest.raises(ExportError) as caught:
        plain(path, data)
    assert str(path) in str(caught.value)
    return str(caught.value)


def replace_record(path: Path, name: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """Write the archive again with another record `name` (the end of it is enough)."""
    with zipfile.ZipFile(path) as archive:
        records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for record, old in records:
            archive.writestr(record, content if record.endswith(name) else old)
    return path


def record_of(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(record for record in archive.namelist() if record.endswith(name)))


# What is read


def test_a_state_dict_comes_back_as_torch_reads_it(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    path = save(tmp_path / "policy.ckpt", network.state_dict())
    ours, theirs = load_torch(path), torch.load(path, weights_only=True)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)


def test_views_dtypes_parameters_and_containers_come_back(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]
    document = {
        "part": base[2:5],
        "transposed": base.reshape(3, 4).T,
        "scalar": torch.tensor(3),
        "nothing": torch.empty(0, 3),
        "truth": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "kinds": [base.to(dtype) for dtype in dtypes],
        "parameter": torch.nn.Parameter(base),
        "ordered": OrderedDict(a=1),
        "default": defaultdict(list, a=[1]),
        "size": base.shape,
        "array": np.arange(6.0).reshape(2, 3),
        "set": {1, 2},
        "names": ("a", None, True, 2.5, 10**30, b"\x00\xff"),
    }
    found = load_torch(save(tmp_path / "all.ckpt", document))
    assert torch.equal(found["part"], document["part"])
    assert torch.equal(found["transposed"], document["transposed"])
    assert found["scalar"].item() == 3
    assert found["nothing"].shape == (0, 3)
    assert found["truth"].tolist() == [True, False]
    assert found["bytes"].tolist() == [0, 1, 2, 3, 4]
    assert [each.dtype for each in found["kinds"]] == dtypes
    assert all(torch.equal(each.double(), base.double()) for each in found["kinds"])
    assert torch.equal(found["parameter"], base)
    assert (found["ordered"], found["default"], found["size"]) == ({"a": 1}, {"a": [1]}, (12,))
    assert np.array_equal(found["array"], document["array"])
    assert (found["set"], found["names"]) == ({1, 2}, document["names"])


def test_tensors_can_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "policy.ckpt", {"a": torch.zeros(4)})
    load_torch(path)["a"].add_(1)
    assert load_torch(path)["a"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_and_arrays_of_every_protocol_come_back(tmp_path: Path, protocol: int) -> None:
    document = {
        "values": [1, -2.5, "ä", b"\xff", b"", None, True, (1, 2, 3, 4), {3}, frozenset({4}), 10**20],
        "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "empty": np.zeros((0, 3)),
        "flags": np.array([True, False]),
        "scalar": np.float64(2.5),
    }
    found = plain(tmp_path / "x.pkl", pickle.dumps(document, protocol=protocol))
    assert found["values"] == document["values"]
    for name in ("float32", "fortran", "empty", "flags"):
        assert found[name].dtype == document[name].dtype
        assert np.array_equal(found[name], document[name])
    assert found["scalar"] == 2.5


def test_arrays_of_the_other_byte_order_have_the_same_numbers(tmp_path: Path) -> None:
    for kind in (">f4", ">i8"):
        found = plain(tmp_path / "x.pkl", pickle.dumps(np.arange(4).astype(kind)))
        assert found.tolist() == [0, 1, 2, 3]


def test_arrays_pickled_by_numpy_1_are_read(tmp_path: Path) -> None:
    data = pickle.dumps(np.arange(3.0), protocol=2).replace(b"numpy._core.", b"numpy.core.")
    assert plain(tmp_path / "x.pkl", data).tolist() == [0, 1, 2]


def test_a_value_that_stands_in_two_places_is_one_value(tmp_path: Path) -> None:
    shared: list[Any] = [1]
    found = plain(tmp_path / "x.pkl", pickle.dumps([shared, shared]))
    assert found[0] is found[1]


# What a reader may ask for beside it


def test_a_foreign_class_that_a_reader_asks_for_stays_inert(tmp_path: Path) -> None:
    data = b"\x80\x02comegaconf.dictconfig\nDictConfig\n)\x81}X\x08\x00\x00\x00_contentK\x05sb."
    (tmp_path / "x.pkl").write_bytes(data)
    found = load_plain(tmp_path / "x.pkl", {("omegaconf.dictconfig", "DictConfig"): Inert})
    assert isinstance(found, Inert)
    assert found.state == {"_content": 5}
    assert "omegaconf.dictconfig.DictConfig), which is not run" in refusal(tmp_path / "x.pkl", data)


def test_a_name_that_may_only_stand_there_is_a_name_and_cannot_be_called(tmp_path: Path) -> None:
    path, table = tmp_path / "x.pkl", {("typing", "Any"): None}
    path.write_bytes(b"ctyping\nAny\n.")
    assert load_plain(path, table) == Global("typing", "Any")
    path.write_bytes(b"ctyping\nAny\n)R.")
    with pytest.raises(ExportError, match=r"calls typing\.Any, which is not run"):
        load_plain(path, table)


# What is never run


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", [os.system, eval, exec, subprocess.check_output, getattr, __import__])
def test_code_is_named_and_not_run(tmp_path: Path, marker: Path, protocol: int, function: Callable[..., Any]) -> None:
    message = refusal(tmp_path / "x.pkl", pickle.dumps([Runs(marker, function)], protocol=protocol))
    assert "contains code (" in message
    assert "which is not run" in message


def test_code_in_an_archive_of_torch_is_not_run(tmp_path: Path, marker: Path) -> None:
    path = save(tmp_path / "policy.ckpt", {"a": torch.ones(2), "b": Runs(marker)})
    with pytest.raises(ExportError, match=rf"policy\.ckpt contains code \({os.system.__module__}\.system\)"):
        load_torch(path)


def test_code_behind_a_name_that_is_allowed_is_not_run(tmp_path: Path, marker: Path) -> None:
    run = f"(S'touch {marker}'\ntR.".encode()
    for called in (b"cos\nsystem\n", b"cnumpy\nndarray\n", b"ccollections\nOrderedDict\ncos\nsystem\n"):
        refusal(tmp_path / "x.pkl", called + run)


@pytest.mark.parametrize(
    "data",
    [
        b"cnumpy\nndarray.tofile\n.",  # an attribute of something allowed
        b"\x8c\x05numpy\x8c\x0fdtype.__class__\x93.",
        b"\x8c\x08builtins\x8c\x07getattr\x93.",
        b"ccollections\nOrderedDict.fromkeys\n.",
        b"\x82\x01.",  # an extension's number
        b"(ios\nsystem\n.",  # INST
        b"(cos\nsystem\no.",  # OBJ
    ],
)
def test_ways_around_the_list_lead_nowhere(tmp_path: Path, data: bytes) -> None:
    refusal(tmp_path / "x.pkl", data)


def test_what_a_call_gave_is_not_called_and_takes_no_state(tmp_path: Path) -> None:
    made = b"ccollections\nOrderedDict\n)R"
    refusal(tmp_path / "x.pkl", made + b")R.")
    refusal(tmp_path / "x.pkl", b"K\x01" + b"}S'__class__'\nK\x02sb.")
    found = plain(tmp_path / "x.pkl", made + b"}S'items'\nK\x02sb.")
    assert found.items() == {}.items(), "attributes of a dictionary are dropped, none is shadowed"


def test_a_state_with_the_name_of_a_method_is_only_kept(tmp_path: Path, marker: Path) -> None:
    data = b"cforeign\nThing\n)R}S'__setstate__'\nS'x'\nsb}S'y'\nK\x01sb."
    (tmp_path / "x.pkl").write_bytes(data)
    found = load_plain(tmp_path / "x.pkl", {("foreign", "Thing"): Inert})
    assert found.state == {"y": 1}


# What does not fill the memory


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", MANY_BYTES) + b"x.",  # BINBYTES8
        b"\x80\x05\x96" + struct.pack("<Q", MANY_BYTES) + b"x.",  # BYTEARRAY8
        b"\x80\x04\x8d" + struct.pack("<Q", MANY_BYTES) + b"x.",  # BINUNICODE8
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",  # LONG4
        b"\x80\x04\x95" + struct.pack("<Q", MANY_BYTES) + b"N",  # FRAME, and no end
        b"I" + b"9" * 100_000 + b"\n.",
        b"(" * 100_000 + b".",
        b"",
        b".",
        b"K\x01K\x02.",
    ],
)
def test_lengths_that_are_not_there_are_refused(tmp_path: Path, data: bytes) -> None:
    refusal(tmp_path / "x.pkl", data)


def test_a_far_place_in_the_memo_costs_nothing(tmp_path: Path) -> None:
    assert plain(tmp_path / "x.pkl", b"K\x01r" + struct.pack("<I", 2**32 - 1) + b".") == 1


def test_values_that_unfold_without_end_are_refused(tmp_path: Path) -> None:
    encoded = (
        b"c_codecs\nencode\nq\x00(X"
        + struct.pack("<I", 10_000)
        + b"a" * 10_000
        + b"q\x01X\x06\x00\x00\x00latin1tq\x02R0"
    )
    again = b"h\x00h\x02R0" * 20_000
    assert "unfolds" in refusal(tmp_path / "x.pkl", encoded + again + b"N.")


def test_deeply_nested_keys_are_refused_before_they_are_hashed(tmp_path: Path) -> None:
    assert "as a key" in refusal(tmp_path / "x.pkl", b"}" + b")" + b"\x85" * 2_000_000 + b"K\x01s.")


@pytest.mark.parametrize(
    "array",
    [
        np.array([{"a": 1}], dtype=object),
        np.array(["text"]),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
    ],
)
def test_arrays_of_anything_but_numbers_are_refused(tmp_path: Path, array: Any) -> None:
    for protocol in (2, 4, 5):
        refusal(tmp_path / "x.pkl", pickle.dumps(array, protocol=protocol))


def test_an_array_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    data = pickle.dumps(np.arange(3, dtype=np.int8), protocol=4)
    changed = data.replace(b"K\x03\x85", b"K\x7f\x85", 1)
    assert changed != data
    assert "shape [127] in 3 bytes" in refusal(tmp_path / "x.pkl", changed)


# Archives of torch that are not what they should be


def test_a_missing_or_another_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is missing"):
        load_torch(tmp_path / "none.ckpt")
    with pytest.raises(ExportError, match="is missing"):
        load_plain(tmp_path / "none.pkl")
    for content, says in (
        (b"", "no file of torch.save"),
        (b"hello world, hello", "no file of torch.save"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ):
        (tmp_path / "x.ckpt").write_bytes(content)
        with pytest.raises(ExportError, match=says):
            load_torch(tmp_path / "x.ckpt")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    for load in (load_torch, load_plain):
        with pytest.raises(ExportError):
            load(tmp_path)


def test_the_format_from_before_1_6_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(ExportError, match=r"before PyTorch 1\.6; load it and torch\.save it again"):
        load_torch(tmp_path / "old.ckpt")


def test_a_torchscript_program_and_another_archive_are_told_apart(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("x/data.pkl", "x/constants.pkl"):
            archive.writestr(name, b"N.")
    with pytest.raises(ExportError, match="TorchScript"):
        load_torch(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", b"x")
    with pytest.raises(ExportError, match=r"not one of torch\.save"):
        load_torch(tmp_path / "other.zip")


def test_a_flipped_bit_in_the_weights_is_seen(tmp_path: Path) -> None:
    path = save(tmp_path / "policy.ckpt", {"a": torch.arange(1000.0)})
    raw = bytearray(path.read_bytes())
    raw[raw.index(torch.arange(1000.0).numpy().tobytes()) + 2000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ExportError, match="cut off or damaged"):
        load_torch(path)


def test_a_cut_archive_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "policy.ckpt", {"a": torch.arange(1000.0)})
    raw = path.read_bytes()
    for length in (10, 100, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(ExportError):
            load_torch(path)


def test_a_storage_of_another_size_or_none_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "policy.ckpt", {"a": torch.arange(10.0)})
    structure = record_of(path, "data.pkl")
    for old, new, says in (
        (b"K\x0atq\x07Q", b"K\xfftq\x07Q", "should hold 255 elements"),
        (b"X\x01\x00\x00\x000q", b"X\x01\x00\x00\x007q", "storage '7' of a tensor is missing"),
        (b"FloatStorage", b"BoolStorage", "should hold 10 elements"),
        (b"FloatStorage", b"QInt8Storage", "contains code"),
    ):
        assert old in structure
        changed = replace_record(save(path, {"a": torch.arange(10.0)}), "data.pkl", structure.replace(old, new))
        with pytest.raises(ExportError, match=says):
            load_torch(changed)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    "arguments", ["0,(1000000,),(0,)", "5,(10,),(1,)", "0,(10,),(2,)", "-1,(2,),(1,)", "0,(2,),(-1,)", "0,(2,2),(1,)"]
)
def test_a_tensor_that_leaves_or_repeats_its_storage_is_refused(tmp_path: Path, arguments: str) -> None:
    class View:
        def __reduce__(self) -> Any:
            offset, size, stride = eval(arguments)
            flat = torch.arange(10.0)
            return torch._utils._rebuild_tensor_v2, (flat.storage(), offset, size, stride, False, OrderedDict())

    path = save(tmp_path / "policy.ckpt", {"a": View()})
    with pytest.raises(ExportError, match=r"\(\w+: a tensor (of|without)"):
        load_torch(path)


def test_a_compressed_archive_is_refused_before_it_unfolds(tmp_path: Path) -> None:
    path = save(tmp_path / "policy.ckpt", {"a": torch.arange(10.0)})
    replace_record(path, "data/0", bytes(50_000_000), zipfile.ZIP_DEFLATED)
    with pytest.raises(ExportError, match="compressed"):
        load_torch(path)


def test_records_of_one_name_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "policy.ckpt", {"a": torch.arange(10.0)})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0], b"N.")
    with pytest.raises(ExportError, match="two records of one name"):
        load_torch(path)


def test_storages_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """A directory whose entries overlap, each as large as the file: a bomb of tensors."""
    path = save(tmp_path / "policy.ckpt", {"a": torch.arange(10_000.0)})
    with zipfile.ZipFile(path, "a") as archive:
        record = next(each for each in archive.infolist() if each.filename.endswith("data/0"))
        for index in range(1, 4):
            twin = zipfile.ZipInfo(record.filename[:-1] + str(index))
            for field in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(twin, field, getattr(record, field))
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
        archive._didModify = True
    with pytest.raises(ExportError, match="it claims"):
        load_torch(path)


# Whatever bytes there are


def only_refuses(load: Callable[[Path], Any], data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(data)
        try:
            load(path)
        except ExportError as error:
            str(error).encode()


@FEW
@given(st.binary(max_size=300))
def test_random_bytes_are_read_or_refused(data: bytes) -> None:
    only_refuses(load_plain, data)
    only_refuses(load_torch, data)


OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
# fmt: off
PIECES = st.sampled_from([
    *OPCODES, b"K\x05", b"(", b")", b"}", b"]", b"R", b"b", b"\x85", b"\x86", b"\x87", b"q\x00",
    b"X\x02\x00\x00\x00f4", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n",
    b"cnumpy._core.multiarray\n_reconstruct\n",
])
# fmt: on


@FEW
@given(st.lists(st.one_of(PIECES, st.binary(max_size=3)), max_size=60))
def test_random_opcodes_are_read_or_refused(pieces: list[bytes]) -> None:
    only_refuses(load_plain, b"".join(pieces) + b".")


def _archive() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "n": np.arange(3.0), "o": OrderedDict(b=[1, "x", None])}, buffer)
    return buffer.getvalue()


ARCHIVE = _archive()
STATISTICS = pickle.dumps({"mean": np.arange(3.0), "std": np.float32(1), "names": ["a", (1, 2)]}, protocol=4)
CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6)


def changed(data: bytes, changes: list[tuple[float, int]]) -> bytes:
    other = bytearray(data)
    for place, value in changes:
        other[int(place * len(other))] = value
    return bytes(other)


@FEW
@given(CHANGES)
def test_statistics_with_changed_bytes_are_read_or_refused(changes: list[tuple[float, int]]) -> None:
    only_refuses(load_plain, changed(STATISTICS, changes))


@FEW
@given(CHANGES)
def test_archives_with_changed_bytes_are_read_or_refused(changes: list[tuple[float, int]]) -> None:
    only_refuses(load_torch, changed(ARCHIVE, changes))


@FEW
@given(CHANGES)
def test_archives_with_a_changed_structure_are_read_or_refused(changes: list[tuple[float, int]]) -> None:
    """The CRC is right here, so that the changed pickle is what is met."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(ARCHIVE)
        replace_record(path, "data.pkl", changed(record_of(path, "data.pkl"), changes))
        only_refuses(load_torch, path.read_bytes())
