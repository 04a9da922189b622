import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sirius.runtime.mask import chain_mask, tree_mask


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_token_sees_its_own_slot_and_those_before_it(dtype):
    mask = chain_mask(torch.tensor([[2, 3], [0, 1]]), visible=5, dtype=dtype)
    seen = mask if dtype is None else mask == 0
    assert mask.shape == (2, 1, 2, 5)
    assert seen[0, 0].tolist() == [[True] * 3 + [False] * 2, [True] * 4 + [False]]
    assert seen[1, 0].tolist() == [[True] + [False] * 4, [True] * 2 + [False] * 3]


def may_look(length: int, branch: list[bool], slot: int) -> bool:
    """The definition: what the row holds, and of the places after that those of the token's branch."""
    if slot < length:
        return True
    return slot - length < len(branch) and branch[slot - length]


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_a_guess_sees_what_its_row_holds_and_its_own_branch(lengths, tokens, places, seed):
    seen = torch.rand(len(lengths), tokens, places, generator=torch.Generator().manual_seed(seed)) < 0.5
    visible = max(lengths) + places
    mask = tree_mask(torch.tensor(lengths), seen, visible, None)
    assert mask[:, 0].tolist() == [
        [[may_look(length, branch, slot) for slot in range(visible)] for branch in row]
        for length, row in zip(lengths, seen.tolist(), strict=True)
    ]
    assert torch.equal(tree_mask(torch.tensor(lengths), seen, visible, torch.float64) == 0, mask)


def test_a_tree_of_one_branch_is_a_chain():
    lengths, chain = torch.tensor([3, 0]), torch.ones(4, 4, dtype=torch.bool).tril().expand(2, -1, -1)
    want = chain_mask(lengths[:, None] + torch.arange(4), 7, torch.float32)
    assert torch.equal(tree_mask(lengths, chain, 7, torch.float32), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_hidden_is_so_by_the_least_finite_number(dtype):
    mask = tree_mask(torch.tensor([1]), torch.tensor([[[True, False]]]), 3, dtype)
    assert mask.tolist() == [[[[0.0, 0.0, torch.finfo(dtype).min]]]]
