"""The routers of a mixture's layers, from the file in which its maker gives them.

It holds linear layers with a row for each adapter. Their names are paths: ``router.weight`` [E, in] and,
where it has one, ``router.bias`` [E] are those of every layer that has no nearer one, and
``<module>.router.weight`` those of all below that module. Each layer's router reads the layer's own input.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from timbre_methods.contract import Site, Sites, Tensors
from timbre_methods.errors import InvalidRecipe, InvalidTensors
from timbre_methods.routed.lora_mixer import ROUTER, ROUTER_BIAS
from timbre_methods.site_tensors import check_tensor, nearest_fact


def routers_of(
    router: Tensors, experts: Mapping[str, object], num_experts: int, sites: Sites
) -> dict[str, dict[str, Tensor]]:
    """The router of each layer, by key. Raises `InvalidRecipe`."""
    owners = _owners(router, experts, sites)
    unused, found = set(router), {}
    for path in experts:
        owner = _nearest(path, owners)
        if owner is None:
            raise InvalidRecipe(
                f"the router's file has no router for {path}, which the adapters change; give it "
                f"'{path}.{ROUTER}', or '{ROUTER}' for all layers that have no nearer one"
            )
        names = {key: _name(owner, key) for key in (ROUTER, ROUTER_BIAS)}
        found[path] = {key: router[name].clone() for key, name in names.items() if name in router}
        unused -= set(names.values())
        _check_shapes(names, found[path], num_experts, sites[path])
    if unused:
        raise InvalidRecipe(
            f"the router's file has {min(unused)}, but each layer below has a nearer router; leave it out"
        )
    return found


def _owners(router: Tensors, experts: Mapping[str, object], sites: Sites) -> set[str]:
    """The modules that the file has routers for."""
    owners = set()
    for name in router:
        owner = _owner(name)
        if owner and not any(path == owner or path.startswith(f"{owner}.") for path in experts):
            is_known = any(path == owner or path.startswith(f"{owner}.") for path in sites)
            fact = "none of the adapters changes a layer there" if is_known else nearest_fact(owner, sites)
            raise InvalidRecipe(f"the router's file has {name}, but {fact}")
        if _name(owner, ROUTER) not in router:
            raise InvalidRecipe(f"the router's file has {name}, but no {_name(owner, ROUTER)}")
        owners.add(owner)
    return owners


def _owner(name: str) -> str:
    """The module whose layers a tensor of the router's file is for; empty for all."""
    for key in (ROUTER, ROUTER_BIAS):
        if name == key or name.endswith(f".{key}"):
            return name.removesuffix(key).removesuffix(".")
    raise InvalidRecipe(
        f"the router's file has {name[:200]!r}; expected '{ROUTER}' and '{ROUTER_BIAS}', each alone or after "
        "the path of a layer or of a module around it"
    )


def _name(owner: str, key: str) -> str:
    return f"{owner}.{key}" if owner else key


def _nearest(path: str, owners: set[str]) -> str | None:
    while path not in owners:
        if not path:
            return None
        path = path.rpartition(".")[0]
    return path


def _check_shapes(names: Mapping[str, str], own: Mapping[str, Tensor], num_experts: int, site: Site) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        ROUTER: (num_experts, site.in_features),
        ROUTER_BIAS: (num_experts,),
    }
    for key, tensor in own.items():
        try:
            check_tensor(names[key], tensor, shapes[key])
        except InvalidTensors as error:
            raise InvalidRecipe(
                f"the router's file: {error}: a row for each of the {num_experts} parents, as wide as the "
                f"input of {site.path}"
            ) from error
