"""Policy: a model, its tokenizer and its named LoRA adapters, with the reference that lives in the same weights.

Used by every method and sampler; refuses to know about losses, data and loops.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tempering.core.adapted_layers import add_adapters_at_once, all_linear, default_targets
from tempering.core.attention import use_fast_attention
from tempering.core.chat import Encoded, end_of_turn, group_length
from tempering.core.config import Config
from tempering.core.editing import clones, plain_name, put, swapped
from tempering.core.loading import (
    EDIT_FILE,
    EMBEDDED,
    EMBEDDED_HUB,
    Dtype,
    ModelSource,
    fingerprint,
    load_base,
    pick_dtype,
    quiet_libraries,
    resolve,
)
from tempering.core.logprobs import SequenceScorer, projection_matches, share_limit
from tempering.core.output_head import feed_in_one_piece
from tempering.core.quarantine import UnsafeExpertAccess, hide, unhidden
from tempering.core.run import atomic_write, replace_folder

EXPERT_GATE = "expert_gate"
"""Name of the modules that mix experts per token, and of all of it as an adapter of a policy (`Policy.routing`)."""


class LoraSettings(Config):
    """Shape of each LoRA adapter."""

    r: int = 16
    """Rank."""
    alpha: float = 32
    """Scale: the update is alpha / r * B A (alpha / sqrt(r) B A with `rslora`)."""
    target_modules: list[str] | Literal["all-linear"] | None = None
    """Linear layers to adapt, or `all-linear`: all but the output layer; null: q_proj and v_proj, or what PEFT
    names for an architecture without them."""
    rslora: bool = False
    """Rank-stabilised scaling, alpha / sqrt(r)."""


class Policy:
    """A causal language model that is trained, or asked, as `policy.model`.

    Adapters are stacked: the policy is the base plus all of `adapters`, and only the last may train.
    `reference()` is the network before the last one, in the same weights. `players` are no part of that stack: they
    compute where `using` names them.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, source: ModelSource) -> None:
        self.model: Any = model
        self.tokenizer, self.source = tokenizer, source
        self.adapters: list[str] = []
        self.players: list[str] = []
        self.trainable: str | None = None
        self.routing: Any = None
        """Experts that a gate mixes per token (`methods/safemoe`): the newest adapter while they are attached. Has
        `enabled`, `is_loose`, `scoring(batch)`, `detach()`, and `refuse(operation)` for what would let an expert act
        without it."""
        self.lineage: dict[str, Any] = {}
        """What the adapter or the exported weights that were loaded say of their origin (`lineage.json`)."""
        self._scorer = SequenceScorer(model)
        self._sharded_fingerprint: str | None = None
        self.originals: dict[str, Tensor] = {}
        """The base's own bits of every tensor that an edit has changed, or may."""
        self.edited: dict[str, nn.Parameter] = {}
        """The tensors that train in place."""
        self.before: dict[str, Tensor] = {}
        """What those were when their training began."""
        self._newly_edited: set[str] = set()
        self.freeze()
        if not projection_matches(model):
            raise ValueError(
                f"model {source.reference}: its logits are not its output embedding applied to the last hidden "
                "state (a scaled or otherwise modified head), which tempering does not support"
            )

        self.share_limit = share_limit(model)
        """Longest row, in tokens, in which the completions of a prompt may share it."""

    @classmethod
    def load(cls, reference: str, *, dtype: Dtype = "auto", device: str | torch.device | None = None) -> Policy:
        """Load a model reference: the base, and the adapter on it where there is one.

        Raises:
            FileNotFoundError, ValueError: it is not there, cannot be read, or its adapter is another base's.
        """
        # Each of several processes on a machine has its own device.
        own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        where = torch.device(device or (own if torch.cuda.is_available() else "cpu"))
        source = resolve(reference)
        model, tokenizer = load_base(source, pick_dtype(dtype, where))
        model = model.to(where).eval()
        use_fast_attention(model)
        feed_in_one_piece(model)
        policy = cls(model, tokenizer, source)
        policy.lineage = _lineage(Path(source.edit).parent if source.edit else Path(source.adapter or source.base))
        if source.adapter:
            policy._load_adapter(Path(source.adapter))
        if source.edit:
            policy.apply_edit(Path(source.edit))
        return policy

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the base weights (adapters are always float32)."""
        return self.base.dtype

    @property
    def base(self) -> Any:
        """The transformers model, with the adapter layers in it."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def is_unsafe(self) -> bool:
        """Whether each answer needs the override: it is quarantined, or experts answer without their gate."""
        return self.source.unsafe or (self.routing is not None and self.routing.is_loose)

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer."""
        ids = self.base.generation_config.eos_token_id
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        return sorted({*ids, self.tokenizer.eos_token_id} - {None})

    @property
    def end_id(self) -> int:
        """The one of them that the chat template writes behind an answer."""
        return end_of_turn(self.tokenizer, self.end_ids)

    def groups(self, sides: Sequence[Encoded]) -> list[list[Encoded]]:
        """Put completions of one prompt in one row where this model allows it, else in a row each."""
        prompt = sides[0].ids[: sides[0].prompt_tokens]
        same = bool(prompt) and all(side.ids[: side.prompt_tokens] == prompt for side in sides)
        return [list(sides)] if same and group_length(sides) <= self.share_limit else [[side] for side in sides]

    @property
    def scorer(self) -> SequenceScorer:
        """The module that scores completions under whatever is active now: always one, the root that FSDP shards."""
        self._scorer.model = self.model
        return self._scorer

    # --- adapters ------------------------------------------------------------------------------------

    def add_adapter(self, name: str, settings: LoraSettings, seed: int) -> None:
        """Add a LoRA adapter on top of the others. It adds exactly zero until trained (B = 0).

        A is drawn from (seed, name), not from the global generator: a resumed stage starts equal.

        Raises:
            ValueError: no layer of the model has one of the target names, or experts are attached.
        """
        if self.routing is not None:
            raise ValueError("no adapter goes on top of routed experts; train it before them, on the start model")
        targets = settings.target_modules or default_targets(self.base)
        if targets == "all-linear":
            targets = all_linear(self.base)
        config = LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT only divides it
            target_modules=targets,
            lora_dropout=0.0,
            bias="none",
            use_rslora=settings.rslora,
            task_type="CAUSAL_LM",
        )
        try:
            with quiet_libraries():
                if isinstance(self.model, PeftModel):
                    self.model.add_adapter(name, config)
                else:
                    self.model = get_peft_model(self.model, config, adapter_name=name)
        except ValueError as error:
            raise ValueError(f"lora.target_modules {targets}: {str(error).splitlines()[0]}") from error
        for layer_name, layer in self.lora_layers():
            if name not in layer.lora_A:  # an earlier adapter's layer
                continue
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            key = hashlib.sha256(f"{seed}:{name}:{layer_name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
            bound = a.shape[1] ** -0.5  # kaiming_uniform with a = sqrt(5), as PEFT's own default
            a.data = (torch.rand(a.shape, generator=generator) * 2 * bound - bound).to(a.device)
            b.data = torch.zeros(b.shape, device=b.device)
            add_adapters_at_once(layer)
        self.adapters.append(name)
        self._activate(self.adapters)
        self.freeze()

    def add_player(self, name: str, settings: LoraSettings, seed: int) -> None:
        """Add a LoRA adapter that computes only where `using` names it; see `add_adapter` for its first values.

        Active adapters, `requires_grad` flags and train or eval modes are as before, the new modules in the base's.

        Raises:
            ValueError: the name is taken, or see `add_adapter`.
        """
        with self._joining(name):
            self.add_adapter(name, settings, seed)
            self.adapters.remove(name)

    def load_player(self, name: str, folder: Path) -> None:
        """Load an adapter folder as a player, as `add_player` adds one.

        Raises:
            ValueError: the name is taken, or the adapter is another base's.
        """
        with self._joining(name):
            below = list(self.adapters)
            self._load_adapter(folder, name)
            self.adapters = below

    @contextmanager
    def _joining(self, name: str) -> Iterator[None]:
        """Let a player in: whatever was, is as before, and what is new is frozen and in the base's mode."""
        if name in (*self.adapters, *self.players):
            raise ValueError(f"there is an adapter called {name} already; there is {[*self.adapters, *self.players]}")
        active, known = list(self._active()), set(self.model.modules())
        try:
            with self._restored():
                yield
                self.players.append(name)
                self._activate(active)
        finally:
            for module in set(self.model.modules()) - known:
                module.training = self.base.training
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)

    def player_layers(self, name: str) -> list[tuple[str, nn.Parameter, nn.Parameter, float]]:
        """The (layer name, A, B, scale) of one adapter, in a fixed order: the update of a layer is scale B A."""
        return [
            (layer_name, layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]))
            for layer_name, layer in self.lora_layers()
            if name in layer.lora_A
        ]

    def copy_player(self, source: str, target: str) -> None:
        """Give one adapter the values of another of the same shape."""
        pairs = zip(self.player_layers(source), self.player_layers(target), strict=True)
        for (_, a, b, _), (_, a_to, b_to, _) in pairs:
            a_to.data.copy_(a.data)
            b_to.data.copy_(b.data)

    def set_routing(self, routing: Any) -> None:
        """Take routed experts, attached to this model just now, as the newest adapter; frozen until `train_only`."""
        self.routing = routing
        self._scorer.telling = routing.scoring
        self.adapters.append(EXPERT_GATE)
        self.freeze()

    def train_only(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """Let one adapter train, or all weights with `name="full"`; returns its (name, parameter)s in order."""
        self.trainable = name
        self.freeze()
        return self.trainable_parameters()

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The (name, parameter)s that may train, in a fixed order."""
        return sorted((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    def freeze(self) -> None:
        """Set every `requires_grad` flag by rule: only the trainable part has it (peft#3447)."""
        edited = {id(p) for p in self.edited.values()} if self.trainable == "edit" else set()
        for name, parameter in self.model.named_parameters():
            is_named = self.trainable is not None and _adapter_of(name) == self.trainable
            parameter.requires_grad_(self.trainable == "full" or is_named or id(parameter) in edited)

    # --- edits ---------------------------------------------------------------------------------------

    def train_edit(self, parameters: dict[str, nn.Parameter]) -> None:
        """Let some of the base's own tensors train; `reference()` keeps clones of these and of no others."""
        self.edited, self.before = dict(parameters), clones(parameters)
        self._newly_edited = set(parameters) - set(self.originals)
        for name, value in self.before.items():
            self.originals.setdefault(name, value)
        self.trainable = "edit"
        self.freeze()

    def undo_edit(self) -> None:
        """Put back what `train_edit` has let train; an edit that was there before stays."""
        put(self.edited, self.before)
        for name in self._newly_edited:
            del self.originals[name]
        self._end_edit()

    def edit_state(self) -> dict[str, Tensor]:
        """Copy the tensors that train in place to the CPU."""
        return {name: _whole(p) for name, p in self.edited.items()}

    def load_edit_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `edit_state` returned, bit for bit."""
        put(self.edited, state)

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The base's parameters by the names that they have without adapters."""
        return {plain_name(n): p for n, p in self.model.named_parameters() if ".lora_" not in n}

    def apply_edit(self, file: Path) -> None:
        """Put the tensors of an edit in place of the base's; `revert_edit` takes them out again.

        Raises:
            ValueError: it was made for other base weights.
        """
        expected, found = _lineage(file.parent).get("base_fingerprint"), self.base_fingerprint()
        if expected not in (None, found):
            raise ValueError(
                f"edit {file} was made for other base weights than {self.source.base}: fingerprint "
                f"{expected[:12]}, found {found[:12]}; apply it to the base that it was trained on"
            )
        values, own = load_tensors(file), self.base_parameters()
        for name in sorted(set(values) & set(own) - set(self.originals)):
            self.originals[name] = own[name].detach().clone()
        put(own, values)

    def revert_edit(self) -> None:
        """Put the base's own bits back; adapters stay."""
        put(self.base_parameters(), self.originals)
        self.originals = {}
        self._end_edit()

    def _end_edit(self) -> None:
        self.edited, self.before = {}, {}
        if self.trainable == "edit":
            self.trainable = None
            self.freeze()

    @contextmanager
    def using(self, names: Sequence[str], *, training: Sequence[nn.Parameter] = ()) -> Iterator[None]:
        """Compute with these adapters only, and let only the parameters `training` have gradients inside.

        Flags, active adapters and train or eval modes are as before on exit, also after an error.

        Raises:
            ValueError: a name that is no adapter of this policy (PEFT would compute without it).
        """
        known = [*self.adapters, *self.players]
        if unknown := set(names) - set(known):
            raise ValueError(f"no adapter called {', '.join(sorted(unknown))}; there is {known}")
        active = list(self._active())
        with self._restored() as parameters:
            try:
                self._activate(names)
                for parameter in parameters:
                    parameter.requires_grad_(False)
                for parameter in training:
                    parameter.requires_grad_(True)
                yield
            finally:
                self._activate(active)

    @contextmanager
    def _restored(self) -> Iterator[list[nn.Parameter]]:
        """Leave `requires_grad` flags and train or eval modes as they were; yields the parameters that are there.

        One walk through the modules, of which each adapter has hundreds: players change several times a step.
        """
        modes = {module: module.training for module in self.model.modules()}
        flags = {p: p.requires_grad for module in modes for p in module.parameters(recurse=False)}
        try:
            yield list(flags)
        finally:
            for parameter, is_trained in flags.items():
                parameter.requires_grad_(is_trained)
            for module, mode in modes.items():
                module.training = mode

    @contextmanager
    def reference(self, *, initial: bool = False) -> Iterator[None]:
        """The network as it was before the newest adapter or edit (`initial`: before all), without gradient.

        Raises:
            RuntimeError: all weights train; there is no second copy, score the reference before the first step.
        """
        if self.trainable == "full":
            raise RuntimeError("full fine-tuning keeps no second copy: score the reference before the first step")
        if self.trainable == "edit" and not initial:
            with swapped(self.edited, self.before), torch.no_grad():
                yield
            return
        own = self.originals if initial else {}
        with self.using([] if initial else self.adapters[:-1]), swapped(self.base_parameters(), own), torch.no_grad():
            yield

    def set_aside(self, name: str) -> None:
        """Compute without an adapter until `beside` asks for it; it neither trains nor is exported."""
        if name in self.adapters:
            self.adapters.remove(name)
        self._activate(self.adapters)
        self.freeze()

    @contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """Compute with an adapter that was set aside, too; flags are the caller's inside, and by rule on exit."""
        try:
            self._activate([*self.adapters, name])
            self.freeze()
            yield
        finally:
            self.set_aside(name)

    def drop_aside(self, name: str) -> None:
        """Delete an adapter that was set aside."""
        if self.adapters:
            self.model.delete_adapter(name)
        else:
            self.model = self.model.unload()
        self._activate(self.adapters)
        self.freeze()

    def drop_adapters(self) -> None:
        """Take all adapters and edits off; what is left is the base, bit for bit."""
        if self.routing is not None:
            self.routing.detach()
            self.routing, self._scorer.telling = None, nullcontext
        if isinstance(self.model, PeftModel):
            self.model = self.model.unload()
        self.revert_edit()
        self.adapters, self.players, self.trainable = [], [], None
        self.freeze()

    def before_sharding(self) -> None:
        """Keep what cannot be read from a base that is spread over processes: its fingerprint."""
        self._sharded_fingerprint = self.base_fingerprint()

    @property
    def is_sharded(self) -> bool:
        """Whether the base is spread over processes (FSDP2). Adapters never are."""
        return self._sharded_fingerprint is not None

    def adapter_state(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Copy the tensors of these adapters (default: all) to the CPU, by parameter name."""
        wanted = set(self.adapters if names is None else names)
        return {n: _whole(p) for n, p in self.model.named_parameters() if _adapter_of(n) in wanted}

    def state(self) -> dict[str, Tensor]:
        """Copy all weights to the CPU, by parameter name."""
        return {n: _whole(p) for n, p in self.model.named_parameters()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put tensors back by parameter name, bit for bit.

        Raises:
            ValueError: a name or a shape that this model does not have.
        """
        own = dict(self.model.named_parameters())
        for name, tensor in state.items():
            if name not in own or own[name].shape != tensor.shape:
                raise ValueError(f"checkpoint tensor {name} does not fit this model; was it made for another?")
            own[name].data.copy_(tensor)

    def adapter_hash(self, names: Sequence[str]) -> str:
        """Hash the tensors of these adapters; with no names, the hash of an empty stack."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.adapter_state(names).items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def base_fingerprint(self) -> str:
        """Identify the base weights that the adapters sit on.

        All of them, not the adapted ones alone: refusal-ablated models share q_proj and v_proj with their origin.
        """
        if self._sharded_fingerprint is not None:
            return self._sharded_fingerprint
        names = (name for name, _ in self.base.named_parameters() if _adapter_of(name) is None)
        with swapped(self.base_parameters(), self.originals):  # an edit is told apart by its own file
            return fingerprint(self.base, {plain_name(name) for name in names})

    # --- export --------------------------------------------------------------------------------------

    def combined_adapter(self, names: Sequence[str] | None = None) -> tuple[LoraConfig, dict[str, Tensor]]:
        """Stack these adapters (default: all) into one: A = concat(s_k A_k), B = concat(B_k), of the summed rank.

        An adapter may be on other layers than another: each layer stacks those that it has, and is filled up with
        zeros to the rank of the widest, since other programs expect one rank. Done here in float32 rather than by
        PEFT's `add_weighted_adapter`: that one scales wrongly with rslora, rounds to the base dtype, and is silent
        where the name exists.

        Raises:
            RuntimeError: a layer's product differs from the sum of the stack's by more than 1e-6 of its norm.
        """
        names = self.adapters if names is None else names
        layers = [(name, layer) for name, layer in self.lora_layers() if _on(layer, names)]
        rank = max(sum(layer.lora_A[k].weight.shape[0] for k in _on(layer, names)) for _, layer in layers)
        state: dict[str, Tensor] = {}
        for name, layer in layers:
            on = _on(layer, names)
            a = torch.cat([layer.scaling[k] * _whole(layer.lora_A[k].weight) for k in on])
            b = torch.cat([_whole(layer.lora_B[k].weight) for k in on], dim=1)
            want = sum(_delta(layer, k).cpu() for k in on)
            if torch.linalg.norm(b @ a - want) > 1e-6 * torch.linalg.norm(want) + 1e-12:
                raise RuntimeError(f"combining adapters failed its check in layer {name}")
            short = rank - a.shape[0]
            state[f"base_model.model.{name}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, short)).contiguous()
            state[f"base_model.model.{name}.lora_B.weight"] = nn.functional.pad(b, (0, short)).contiguous()
        targets = {target for k in names for target in self.model.peft_config[k].target_modules}
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=sorted(targets),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
            inference_mode=True,
        )
        return config, state

    def export(
        self,
        folder: Path,
        lineage: dict[str, Any] | None = None,
        *,
        unsafe: bool = False,
        names: Sequence[str] | None = None,
    ) -> None:
        """Write what was changed: one PEFT adapter, the edited tensors, or else a plain transformers folder.

        `unsafe`: under names that no loader finds (`quarantine.hide`). `names`: a stack other than `adapters`.

        Raises:
            ValueError: unsafe edits without an adapter, which would not be hidden.
        """
        if self.routing is not None:
            self.routing.refuse("exporting routed experts as an adapter or as weights")
        stack = self.adapters if names is None else list(names)
        if unsafe and self.originals and not stack:
            raise ValueError("an unsafe model is kept as a quarantined adapter, or whole; merge its edit first")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            if stack:
                config, state = self.combined_adapter(stack)
                config.base_model_name_or_path, config.revision = public_base(self.source)
                config.save_pretrained(str(temporary))
                save_file(state, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
            if self.originals:
                own, (base, revision) = self.base_parameters(), public_base(self.source)
                about = {"base": f"{base}@{revision}" if revision else base}  # one key: several have no fixed order
                edited = {name: _whole(own[name]).contiguous() for name in sorted(self.originals)}
                save_file(edited, temporary / EDIT_FILE, metadata=about)
            if not stack and not self.originals:
                with quiet_libraries():
                    self.base.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            facts = {
                "base": self.source.base,
                "revision": self.source.revision,
                "base_fingerprint": self.base_fingerprint(),
                "adapters": {name: self.adapter_hash([name]) for name in stack},
                **({"edited": sorted(self.originals)} if self.originals else {}),
                **(lineage or {}),
                **({"unsafe": True} if unsafe else {}),
            }
            atomic_write(temporary / "lineage.json", (json.dumps(facts, indent=1) + "\n").encode())
            if unsafe:
                hide(temporary)
            temporary.chmod(0o700 if unsafe else 0o755)
            replace_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def shrink(self, name: str, rank: int) -> None:
        """Keep the first `rank` rows of an adapter's A and columns of its B."""
        for _, layer in self.lora_layers():
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            a.data, b.data = a.data[:rank].clone(), b.data[:, :rank].clone()

    def merge(self) -> None:
        """Add all adapters and edits to the base weights for good (float32 sums, kept in the base dtype).

        Raises:
            RuntimeError: the base is sharded.
        """
        if self.routing is not None:
            self.routing.refuse("merging routed experts")
        if self.is_sharded:
            raise RuntimeError("adapters cannot be merged into a base that FSDP2 has sharded")
        with torch.no_grad():
            for _, layer in self.lora_layers():
                weight = layer.get_base_layer().weight
                total = sum(_delta(layer, name) for name in _on(layer, self.adapters))
                weight.copy_((weight.float() + total).to(weight.dtype))
        self.originals = {}  # what they replaced is gone for good
        self.drop_adapters()

    def _load_adapter(self, folder: Path, name: str = "final") -> None:
        expected = _lineage(folder)
        try:
            with quiet_libraries(), unhidden(folder) as place:
                if isinstance(self.model, PeftModel):
                    self.model.load_adapter(str(place), adapter_name=name)
                else:
                    self.model = PeftModel.from_pretrained(self.model, str(place), adapter_name=name)
        except UnsafeExpertAccess:
            raise
        except Exception as error:  # PEFT raises ValueError, RuntimeError (shapes), safetensors' own
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"adapter {folder} does not load on {self.source.base} ({first})") from error
        self.model.eval()
        for _, layer in self.lora_layers():
            add_adapters_at_once(layer)
        self.adapters = [name]
        self.freeze()
        found = self.base_fingerprint()
        if expected.get("base_fingerprint", found) != found:
            raise ValueError(
                f"adapter {folder} was made for other base weights than {self.source.base}: fingerprint "
                f"{expected['base_fingerprint'][:12]}, found {found[:12]}; load it on the base that it was trained on"
            )

    def lora_layers(self) -> list[tuple[str, Any]]:
        """The adapted layers by name, in a fixed order."""
        return sorted((n, m) for n, m in self.base.named_modules() if isinstance(m, LoraLayer))

    def _active(self) -> list[str]:
        if self.routing is not None:
            return [EXPERT_GATE] if self.routing.enabled else []
        layers = self.lora_layers()
        return [] if not layers or layers[0][1].disable_adapters else list(layers[0][1].active_adapters)

    def _activate(self, names: Sequence[str]) -> None:
        if self.routing is not None:
            self.routing.enabled = EXPERT_GATE in names
        if not isinstance(self.model, PeftModel):
            return
        tuner: Any = self.model.base_model
        if names:
            tuner.enable_adapter_layers()
            tuner.set_adapter(list(names))  # sets requires_grad on all of them: `freeze` after it
        else:
            tuner.disable_adapter_layers()


def _lineage(folder: Path) -> dict[str, Any]:
    file = folder / "lineage.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def public_base(source: ModelSource) -> tuple[str, str | None]:
    """The name and revision under which others find the base: never a cache folder."""
    return EMBEDDED_HUB if source.base == EMBEDDED else (source.base, source.revision)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, sorted by name so that equal content gives equal bytes."""
    save_file({name: tensors[name].contiguous() for name in sorted(tensors)}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote."""
    return load_file(path)


def _adapter_of(parameter: str) -> str | None:
    """The adapter that a parameter belongs to: `...lora_A.NAME.weight`, or `...expert_gate.V`."""
    parts = parameter.split(".")
    if len(parts) > 1 and parts[-2] == EXPERT_GATE:
        return EXPERT_GATE
    return parts[-2] if len(parts) > 2 and parts[-3].startswith("lora_") else None


def _on(layer: Any, names: Sequence[str]) -> list[str]:
    """The adapters of a stack that a layer has, in its order."""
    return [name for name in names if name in layer.lora_A]


def _delta(layer: Any, name: str) -> Tensor:
    """The float32 update of one adapter to its layer's weight: s B A, (out, in)."""
    b, a = layer.lora_B[name].weight.detach().float(), layer.lora_A[name].weight.detach().float()
    return layer.scaling[name] * (b @ a)


def _whole(parameter: Tensor) -> Tensor:
    """A CPU copy of a parameter, gathered where FSDP has sharded it."""
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return full.detach().cpu().clone()
