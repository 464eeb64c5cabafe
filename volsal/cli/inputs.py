"""What commands make of their words: a config, scans, cases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from volsal.cli.console import cell, err, say

if TYPE_CHECKING:
    from volsal.config import Config


def volume_of(text: str | None) -> int | Literal["all"] | None:
    """What --volume means: a number, all, or None."""
    if text is None or text == "all":
        return text  # type: ignore[return-value]
    if not text.isdecimal():
        raise typer.BadParameter(f"--volume {text!r}: expected a number from 0, or all")
    return int(text)


def reading_of(config: Config, **given: Any) -> dict[str, Any]:
    """How scans are read: as the config says, but for what was given on the command line."""
    configured = config.scans.reading() if config.scans else {}
    return {**configured, **{name: value for name, value in given.items() if value is not None}}


def loaded(config: Config) -> Config:
    """The config, with its number of threads set."""
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    return config


def trusted(config: Config, trust: bool) -> bool:
    """The user's consent, told before anything runs what it is that runs."""
    from volsal.explain import trusted_to_run

    if not trust:
        return False
    if config.model.bundle is None:
        raise typer.BadParameter(f"--trust-bundle: {config.path} names no bundle")
    lines = trusted_to_run(config)
    say(f"{config.model.bundle} is trusted; of its own it runs:" if lines else "nothing in the bundle needs trust", err)
    for line in lines:
        say(cell(f"  {line}"), err, style="yellow")
    return True


def a_scan(config: Config, scans: list[Path] | None, series: str | None, slices: str | None) -> Any:
    """The scan that was named, or the first of the config's."""
    from volsal.batch.cases import cases_of
    from volsal.config import ConfigError
    from volsal.scans import read_case

    if not scans and config.scans is not None:
        cases = cases_of(config).cases
        scans = next((list(case.paths) for case in cases.values() if not case.fault), None)
    if not scans:
        raise ConfigError(f"{config.path}: name a scan, so that the model can be run once (or give --shape)")
    return read_case(scans, **reading_of(config, series=series, slices=slices))


def shape_of(text: str) -> tuple[int, ...]:
    """ "1,96,96,96" as numbers: channels, depth, height, width."""
    parts = text.replace("x", ",").split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r}: expected channels and three sizes, as in 1,96,96,96")
    return tuple(int(part) for part in parts)


def some_cases(config: Config, scans: list[Path] | None, number: int) -> list[Sequence[Path]]:
    """The files of each scan named, or of up to ``number`` of the config's cases, evenly spread."""
    if scans:
        return [[scan] for scan in scans]
    from volsal.batch.cases import cases_of
    from volsal.config import ConfigError

    if config.scans is None:
        raise ConfigError(f"{config.path}: name some scans, here or under 'scans', to measure on")
    whole: list[Sequence[Path]] = [case.paths for case in cases_of(config).cases.values() if not case.fault]
    step = max(1, len(whole) // number)
    return whole[::step][:number]
