from __future__ import annotations

import pytest
import torch

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.named_sizes import check_named_size
from timbre_methods.site_tensors import SiteTensors

FOUND = SiteTensors(Site("q", torch.eye(4), None), {"factor": torch.ones(3, 4)})


@pytest.mark.parametrize(("default", "pattern"), [(3, None), (8, {"q": 3}), (8, {"other": 3, "q": 5})])
def test_a_size_that_the_config_names_for_any_layer_is_accepted(
    default: int, pattern: dict[str, int] | None
) -> None:
    check_named_size(FOUND, "factor", 3, "rank 3", default, pattern)


def test_a_size_that_the_config_does_not_name_is_refused_in_a_line() -> None:
    with pytest.raises(InvalidTensors, match=r"q\.factor: found rank 3, the config says \[5, 8\]$"):
        check_named_size(FOUND, "factor", 3, "rank 3", 8, {"q": 5})
    many = {str(size): size for size in range(4, 4000)}
    with pytest.raises(InvalidTensors) as refusal:
        check_named_size(FOUND, "factor", 3, "rank 3", 8, many)
    assert len(str(refusal.value)) < 200
