"""Hook a selection of weights into a model, and look up what it has there."""

from collections.abc import Mapping

from torch import nn
from torch.utils.hooks import RemovableHandle

from q8lightning.qat.compiled import forget_compiled_code
from q8lightning.qat.engage.hooks import MasterKeeper, QuantizeInputs, StateDictHooks
from q8lightning.qat.engage.weight_groups import WeightGroups
from q8lightning.qat.select.selected import Selection
from q8lightning.qat.select.structure import Structure


class Attachment:
    """The groups of the selected weights, and the hooks of their modules, until :meth:`remove`.

    Args:
        quantizer: What the hooks ask for masters. They do not keep it alive.
        module: The model.
        selection: What is quantized of it.

    Attributes:
        selection: The same.
        structure: The parameters and modules of the model.
        groups: The weights in groups that are quantized together.
    """

    def __init__(self, quantizer: MasterKeeper, module: nn.Module, selection: Selection) -> None:
        self.selection = selection
        self.structure = Structure(module)
        self.groups = WeightGroups(selection.weights)
        self._module = module
        self._handles: list[RemovableHandle] = []
        self._inputs = [QuantizeInputs(each.rule.codebook, each.rule.per == "tensor") for each in selection.modules]
        for each, hook in zip(selection.modules, self._inputs, strict=True):
            self._handles.append(each.module.register_forward_pre_hook(hook))
        if selection.modules:
            forget_compiled_code()
        selected = {weight.parameter for weight in selection.weights}
        self._owners = [each for each in module.modules() if not selected.isdisjoint(each.parameters(False))]
        for owner in self._owners:
            self._handles += StateDictHooks(quantizer).attach(owner)

    def quantize_inputs(self, wanted: bool) -> None:
        """Let the selected modules quantize their inputs from now on, or take them as they are."""
        for hook in self._inputs:
            hook.enabled = wanted

    def replaced(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that have taken the place of selected weights, by name."""
        weights = self.selection.weights
        selected: Mapping[str, nn.Parameter] = {name: each.parameter for each in weights for name in each.names}
        now = self._module.named_parameters(remove_duplicate=False)
        return [(name, each) for name, each in now if name in selected and each is not selected[name]]

    def has_weights_of(self, module: nn.Module) -> bool:
        """Whether a module has selected weights, also while others stand in for them because they are gathered."""
        owners = set(map(id, self._owners))
        return any(id(each) in owners for each in module.modules()) or any(
            id(parameter) in self.groups.places for parameter in module.parameters()
        )

    def remove(self) -> None:
        """Remove all hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
