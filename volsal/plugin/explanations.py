"""What the Explain panel asks for and what it gets, without Qt: a config's model, ready for question after question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from volsal.attribution import METHODS, Method, list_layers, parse_target
from volsal.attribution.settings import SettingError
from volsal.choices import as_method
from volsal.config import Config, load_config
from volsal.explain import Explainer
from volsal.explanation import Explanation
from volsal.run_folder import RunFolder
from volsal.scans import Scan, read_case
from volsal.scans.find import in_order

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Desk:
    """A config with its model in memory.

    Attributes
    ----------
    config : as read
    explainer : with the config's own methods and targets
    """

    config: Config
    explainer: Explainer

    @classmethod
    def of(cls, path: Path) -> Desk:
        """Read the config and load its model.

        Raises
        ------
        VolsalError
            Of all the kinds that a config and a model can be wrong in.
        """
        config = load_config(path)
        return cls(config, Explainer.from_config(config))

    @property
    def methods(self) -> list[str]:
        """What can be chosen: the config's methods by their names, then all others by their ids."""
        return [*self.explainer.names, *(id for id in METHODS if id not in self.explainer.names)]

    @property
    def targets(self) -> list[str]:
        """What suggests itself: the config's targets, the model's classes by name, and the predicted class."""
        return list(dict.fromkeys([*map(str, self.config.targets), *self.explainer.classes, "predicted-class"]))

    def read(self, source: Scan | Sequence[Path]) -> Scan:
        """The scan: as it is, or read from a case's files, as the config says."""
        if isinstance(source, Scan):
            return source
        section = self.config.scans
        paths = in_order(source, section.channels) if section and section.channels and len(source) > 1 else source
        return read_case(list(paths), **(section.reading() if section else {}))

    def layers(self, source: Scan | Sequence[Path]) -> list[str]:
        """The layers of the model that could carry a map of that scan, the last one first.

        Raises
        ------
        VolsalError
            Where the scan or the model cannot be used.
        """
        tensor = self.explainer.at_once(self.explainer.model_input(self.read(source)))
        return [layer.name for layer in list_layers(self.explainer.model, tensor) if layer.suitable][::-1]

    def method(self, name: str, layers: Sequence[str] = ()) -> list[Method]:
        """The method of that name, once for each of ``layers``; as the config has it where no layer is named.

        A method that fuses several layers takes all of them at once.

        Raises
        ------
        SettingError
            Where layers are named for a method that has none.
        """
        own = dict(zip(self.explainer.names, self.explainer.methods, strict=True))
        method = own[name] if name in own else as_method(name)
        settings = vars(method)
        if not layers:
            return [method]
        changeable: Any = method
        if "layers" in settings:
            return [replace(changeable, layers=tuple(layers))]
        if "layer" in settings:
            return [replace(changeable, layer=layer) for layer in layers]
        raise SettingError(f"{name} takes its map at the input and at no layer; choose none")

    def explain(
        self, source: Scan | Sequence[Path], method: str, layers: Sequence[str], target: str, progress: Progress
    ) -> Explanation:
        """The maps of one scan; errors as for :class:`volsal.Explainer`.

        ``progress`` may raise to end the work: the model is left as it was.
        """
        base = self.explainer
        asked = Explainer(
            base.model,
            base.preprocess,
            self.method(method, layers),
            [parse_target(target, base.classes, self.config.folder)],
            base.classes,
            self.config.alignment,
            base.alignments,
            per_channel=base.per_channel,
            channels=base.channels,
            folder=base.folder,
            progress=progress,
            fast=base.fast,
            windows=base.windows,
            bundle=base.bundle,
            source=base.source,
        )
        progress("reading the scan", 0, 0)
        scan = self.read(source)
        progress("preprocessing", 0, 0)
        ready = asked.prepare(scan)
        progress("asking the model", 0, 0)
        answer = asked.answer(ready)
        progress("placing the map", 0, 0)
        explanation = asked.carry(answer)
        progress("done", 1, 1)
        return explanation

    def save(self, explanation: Explanation, folder: Path) -> Path:
        """Write the maps and their record below ``folder``, with pseudonyms for DICOM's identifiers as the config says.

        Raises
        ------
        WriteError
            Where the disk refuses.
        """
        section = self.config.scans
        if explanation.scan.series and not (section and section.identifiers == "plain"):
            explanation = explanation.pseudonymous(RunFolder(folder).salt())
        return explanation.save(folder, self.config.maps.stored_as)
