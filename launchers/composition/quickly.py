"""Hydra, without what it does twice or slowly: the configs it composes are the same.

Where another release of Hydra or OmegaConf is built otherwise, it is as slow as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra._internal.hydra
import omegaconf._utils
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.types import RunMode
from omegaconf import DictConfig

NOT_OF_A_RUN = ("hardware", "sweep")
"""Folders of conf/ whose options no run is composed of: commands of their own read them."""
AS_A_RUN = "hydra.mode=RUN"
"""The override that Hydra 1.3 adds itself where it has found that one run is meant."""


class OneComposition(ConfigLoaderImpl):
    """Composes a single run once.

    `hydra.main` composes twice (hydra/_internal/utils.py, `_run_hydra`): first as if for several
    runs and without a word on what is wrong, to learn from `hydra.mode` how many are meant, and
    again for the run. What composes as a run is the same both times, so that it is kept.
    """

    _kept: tuple[list[str], DictConfig | Exception] | None = None
    """What the overrides have come to as a run."""

    def list_groups(self, parent_name: str) -> list[str]:
        """Return what the help and the shell's completion offer."""
        found = super().list_groups(parent_name)
        return found if parent_name else [name for name in found if name not in NOT_OF_A_RUN]

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        kept, self._kept = self._kept, None
        compose = functools.partial(super().load_configuration, config_name)
        if run_mode == RunMode.MULTIRUN and not validate_sweep_overrides:  # for the mode alone
            try:
                config = compose(list(overrides), RunMode.RUN, from_shell)
            except Exception as error:
                self._kept = (list(overrides), error)
                return compose(overrides, run_mode, from_shell, validate_sweep_overrides)
            self._kept = (list(overrides), config)
            return config
        if run_mode == RunMode.RUN and kept is not None:
            asked, found = kept
            if isinstance(found, Exception) and overrides == [*asked, AS_A_RUN]:
                raise found
            if isinstance(found, DictConfig) and found.hydra.mode is None:
                asked = [*asked, AS_A_RUN]
                found.hydra.mode = RunMode.RUN
                found.hydra.overrides.hydra.append(AS_A_RUN)
            if isinstance(found, DictConfig) and overrides == asked:
                return found
        return compose(overrides, run_mode, from_shell, validate_sweep_overrides)


@contextmanager
def composing(conf: Path) -> Iterator[None]:
    """Have Hydra compose a run once, and read the files below ``conf`` by libyaml."""
    with ExitStack() as stack:
        if getattr(hydra._internal.hydra, "ConfigLoaderImpl", None) is ConfigLoaderImpl:
            stack.enter_context(_with(hydra._internal.hydra, "ConfigLoaderImpl", OneComposition))
        if yaml.__with_libyaml__ and hasattr(omegaconf._utils, "get_yaml_loader"):
            loader = readers(conf)
            stack.enter_context(_with(omegaconf._utils, "get_yaml_loader", lambda: loader))
        yield


@contextmanager
def _with(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Give a module's name another value for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def readers(conf: Path) -> Callable[[Any], Any]:
    """Return what makes a YAML loader for a stream, as OmegaConf's own class does.

    libyaml words errors otherwise, so that it reads only files of which a test says what is in
    them: those below ``conf``.
    """
    plain = omegaconf._utils.get_yaml_loader()
    by_libyaml = libyaml_loader(plain)

    def loader(stream: Any) -> Any:
        name = getattr(stream, "name", None)
        is_ours = isinstance(name, str) and Path(name).is_relative_to(conf)
        return (by_libyaml if is_ours else plain)(stream)

    return loader


def libyaml_loader(plain: type) -> type:
    """Return OmegaConf's loader, its types and its refusal of duplicate keys, with libyaml."""
    from yaml._yaml import CParser
    from yaml.constructor import SafeConstructor
    from yaml.resolver import Resolver

    def start(self: Any, stream: Any) -> None:
        CParser.__init__(self, stream)
        SafeConstructor.__init__(self)
        Resolver.__init__(self)

    return type("LibyamlLoader", (CParser, plain), {"__init__": start})
