"""A loop that ranks run together, saved and gone on with: all of them from one step, to the bit."""

import pathlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel as bl
from bilevel.distributed import Ranks


def made(ranks: Ranks) -> bl.OuterLoop:
    """Tasks of all ranks, a state of each task, and noise of each rank's own."""
    torch.manual_seed(ranks.rank)
    x = torch.ones(3, requires_grad=True)
    tasks = torch.arange(1.0, 4.0)[:, None] * torch.linspace(-1, 1, 5)[ranks.rank :: ranks.size, None, None]

    def loss(y: Tensor, x: Tensor, batch: Tensor) -> Tensor:
        return ((y - x * batch[:, None]).square() * (0.5 + torch.rand(3, 3))).sum()

    return bl.OuterLoop(
        bl.Problem(loss, loss),
        x,
        torch.zeros(len(tasks), 3),
        [bl.Batches(tasks[..., 0], tasks[..., 0])] * 8,
        solver=bl.Descent(bl.SGD(lr=0.01), steps=2),
        estimator=bl.TaskMean(bl.MemoryReduced(steps=2, warm_adjoint=True), group=ranks, chunk=1),
        optimizer=torch.optim.Adam([x], lr=0.1),
    )


def run(loop: bl.OuterLoop, ranks: Ranks, folder: str, until: int = 8) -> Tensor:
    for _ in loop:
        loop.save(folder, keep=2, ranks=ranks)
        if loop.index == until:
            break
    return loop.outer.detach().clone()


def goes_on(ranks: Ranks, folder: str, trouble: str) -> dict[str, Any]:
    whole = run(made(ranks), ranks, f"{folder}/whole")
    parts = f"{folder}/parts"
    run(made(ranks), ranks, parts, until=5)
    mine = pathlib.Path(parts) / f"rank-{ranks.rank}-of-{ranks.size}"
    newest = max(mine.iterdir())
    if ranks.rank == ranks.size - 1:  # was killed before it wrote, or while the disk lost it
        if trouble == "missing":
            newest.unlink()
        if trouble == "damaged":
            newest.write_bytes(newest.read_bytes()[:-100])
    again = made(ranks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = again.load(parts, ranks=ranks)
    assert loaded is not None
    began = again.index
    went = run(again, ranks, parts)
    said = [str(warning.message) for warning in caught if "goes on with step" in str(warning.message)]
    kept = sorted(path.name.split("-", 1)[1] for path in mine.iterdir())
    return {"same": torch.equal(whole, went), "began": began, "said": len(said), "kept": kept, "x": went}


@pytest.mark.parametrize(("trouble", "began"), [("none", 5), ("missing", 4), ("damaged", 4)])
def test_ranks_go_on_from_the_newest_step_that_all_have(ranks: Any, tmp_path: Any, trouble: str, began: int) -> None:
    found = ranks.run(2, goes_on, str(tmp_path), trouble)
    for each in found:
        assert each["same"], each
        assert each["began"] == began
        assert each["said"] == (trouble != "none")
        assert each["kept"] == ["step-7.pt", "step-8.pt"]
    assert torch.equal(found[0]["x"], found[1]["x"])


def refused(ranks: Ranks, folder: str) -> list[str]:
    said = []
    loop = made(ranks)
    assert loop.load(folder, ranks=ranks, missing_ok=True) is None
    for attempt in ("nothing there", "steps apart", "no place on one"):
        try:
            if attempt == "nothing there":
                loop.load(folder, ranks=ranks)
            elif attempt == "steps apart":
                if ranks.rank:
                    loop.skip()
                    loop._index += 1
                loop.save(folder, ranks=ranks)
            else:
                loop._index = 0
                place = pathlib.Path(folder)
                if ranks.rank:
                    place.mkdir(exist_ok=True)
                    (place / f"rank-{ranks.rank}-of-{ranks.size}").write_text("a file")
                loop.save(folder, ranks=ranks)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_what_one_rank_cannot_do_is_an_error_on_all(ranks: Any, tmp_path: Any) -> None:
    first, second = ranks.run(2, refused, str(tmp_path / "saved"))
    for said in (first, second):
        assert "no step that all 2 ranks have saved" in said[0]
        assert "at the steps [0, 1]" in said[1]
    assert "RankError: OuterLoop.save() failed on rank 1" in first[2]
    assert "FileExistsError" in second[2]


def saves(ranks: Ranks, folder: str) -> None:
    run(made(ranks), ranks, folder, until=1)


def loads(ranks: Ranks, folder: str) -> str:
    with pytest.raises(FileNotFoundError) as caught:
        made(ranks).load(folder, ranks=ranks)
    return str(caught.value)


def test_another_number_of_ranks_is_told_what_there_is(ranks: Any, tmp_path: Any) -> None:
    ranks.run(2, saves, str(tmp_path))
    (said,) = ranks.run(1, loads, str(tmp_path))
    assert "rank-0-of-2, rank-1-of-2" in said


def swapped(ranks: Ranks, folder: str) -> str:
    run(made(ranks), ranks, folder, until=1)
    (other,) = (pathlib.Path(folder) / f"rank-{1 - ranks.rank}-of-2").iterdir()
    ranks.agree(None, "both have looked")
    with pytest.raises(ValueError, match="each rank loads the file that it saved") as caught:
        made(ranks).load(other)
    return str(caught.value)


def test_a_file_of_another_rank_is_refused(ranks: Any, tmp_path: Any) -> None:
    first, second = ranks.run(2, swapped, str(tmp_path))
    assert "rank 1 of 2" in first
    assert "rank 0 of 2" in second
