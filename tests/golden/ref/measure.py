"""Numbers of one rollout alone: reward, activations, gradients, attributions, ablations. Groups come later."""

from dataclasses import dataclass, field

import numpy as np
import torch

from .config import Config, Feature
from .model import RewardModel, site_of, site_order
from .sae import Reading, open_sae
from .text import Sequence

Key = tuple[str, int]  # (sae id, feature index)


@dataclass
class Sae:
    """One SAE in its place."""

    id: str
    order: int
    site: tuple[int, str]
    reader: object
    minimum: torch.Tensor  # activation_min of every feature (m)


@dataclass
class Measured:
    """One rollout under one model. Tensors are over C: rows follow `positions`."""

    seq: Sequence
    positions: list[int]
    reward: np.float32
    readings: dict[str, Reading]
    x: dict[str, torch.Tensor]
    grads: dict[str, torch.Tensor] | None = None
    baselines: dict[str, np.float32] = field(default_factory=dict)
    ablated: dict[frozenset, np.float32] = field(default_factory=dict)


class Instrument:
    """Model and SAEs, and everything that is measured with them on one rollout."""

    def __init__(self, config: Config, dtype: str | None = None):
        self.config = config
        self.model = RewardModel(config.folder / config.model["path"], dtype or config.model["dtype"],
                                 config.model)
        self.saes: list[Sae] = []
        for order, row in enumerate(config.saes):
            reader = open_sae(config.folder / row["path"], row.get("format"), row.get("norm_factor"))
            site = site_of(row.get("hook") or reader.hook)
            minimum = torch.zeros(reader.rows.shape[0])
            for feature in config.catalogue.values():
                if feature.sae == row["id"]:
                    minimum[feature.index] = feature.activation_min
            self.saes.append(Sae(row["id"], order, site, reader, minimum))
        self.by_id = {s.id: s for s in self.saes}

    def positions(self, seq: Sequence) -> list[int]:
        first = seq.lead if self.config.attribution["scope"] == "all" else seq.start
        return list(range(first, len(seq.ids)))

    def clean(self, seq: Sequence) -> Measured:
        """The clean run: reward, x at every hook over C, features."""
        positions = self.positions(seq)
        seen = {}

        def keep(site):
            def fn(x):
                seen[site] = x[0, positions].detach().float().clone()
                return x
            return fn

        with torch.no_grad():
            reward = self.model.reward(seq, {s.site: keep(s.site) for s in self.saes})
            x = {s.id: seen[s.site] for s in self.saes}
            readings = {s.id: s.reader.read(x[s.id]) for s in self.saes}
        return Measured(seq, positions, np.float32(reward.float().item()), readings, x)

    def _gradient_at(self, m: Measured, sites: dict) -> dict:
        """dR/dx over C at the given sites; sites: {site: values of x over C, or None to leave x as it is}."""
        leaves = {}

        def fn_for(site, values):
            def fn(x):
                leaf = (torch.zeros(len(m.positions), x.shape[-1]) if values is None else values).to(x.dtype)
                leaves[site] = leaf = leaf.clone().requires_grad_(True)
                new = x.clone()
                new[0, m.positions] = new[0, m.positions] + leaf if values is None else leaf
                return new
            return fn

        with torch.enable_grad():
            reward = self.model.reward(m.seq, {site: fn_for(site, v) for site, v in sites.items()})
            grads = torch.autograd.grad(reward, list(leaves.values()))
        return {site: g.float() for site, g in zip(leaves, grads)}

    def _reward_with(self, m: Measured, site, values: torch.Tensor) -> np.float32:
        def fn(x):
            new = x.clone()
            new[0, m.positions] = values.to(x.dtype)
            return new

        with torch.no_grad():
            return np.float32(self.model.reward(m.seq, {site: fn}).float().item())

    def attribute(self, m: Measured) -> None:
        """Fills m.grads (and m.baselines with completeness)."""
        options = self.config.attribution
        if options["method"] == "grad":
            at = self._gradient_at(m, {s.site: None for s in self.saes})
            m.grads = {s.id: at[s.site] for s in self.saes}
        elif options["method"] == "ig":
            m.grads = {s.id: self._path_gradient(m, s) for s in self.saes}
        if options["completeness"] and options["method"] != "none":
            for s in self.saes:
                m.baselines[s.id] = self._reward_with(m, s.site, m.readings[s.id].bias)

    def _path_gradient(self, m: Measured, s: Sae) -> torch.Tensor:
        """Mean gradient along x_n = (1 - a_n)(x - b) + b, this SAE alone."""
        steps, reading = self.config.attribution["ig_steps"], m.readings[s.id]
        shift = 0.5 if self.config.attribution["ig_rule"] == "midpoint" else 0.0
        features = reading.x_hat - reading.bias
        error = m.x[s.id] - reading.x_hat
        total = torch.zeros_like(error, dtype=torch.float64)
        for n in range(steps):
            a = (n + shift) / steps
            total += self._gradient_at(m, {s.site: (1 - a) * (features + error) + reading.bias})[s.site].double()
        return (total / steps).float()

    def active(self, m: Measured, key: Key) -> bool:
        """f > activation_min somewhere in C."""
        sae = self.by_id[key[0]]
        return bool((m.readings[key[0]].f[:, key[1]] > sae.minimum[key[1]]).any())

    def ablated_reward(self, m: Measured, members: frozenset) -> np.float32:
        """Reward with the set removed, going up the layers over the live x; R itself when none is active."""
        if not any(self.active(m, key) for key in members):
            return m.reward
        if members not in m.ablated:
            m.ablated[members] = self._ablate(m, members)
        return m.ablated[members]

    def _ablate(self, m: Measured, members: frozenset) -> np.float32:
        sites: dict = {}
        for sae in self.saes:
            chosen = sorted(i for name, i in members if name == sae.id)
            if chosen:
                sites.setdefault(sae.site, []).append((sae, chosen))

        def fn_for(pairs):
            def fn(x):
                live = x[0, m.positions].float()
                removed = torch.zeros_like(live)
                for sae, chosen in pairs:
                    reading = sae.reader.read(live)
                    f = reading.f[:, chosen]
                    f = torch.where(f > sae.minimum[chosen], f, torch.zeros_like(f))
                    removed += reading.scale * (f @ sae.reader.rows[chosen])
                new = x.clone()
                new[0, m.positions] = (live - removed).to(x.dtype)
                return new
            return fn

        ordered = {site: fn_for(sites[site]) for site in sorted(sites, key=site_order)}
        with torch.no_grad():
            return np.float32(self.model.reward(m.seq, ordered).float().item())

    def effect(self, m: Measured, members: frozenset) -> np.float32:
        return np.float32(self.ablated_reward(m, members) - m.reward)

    def attributions(self, m: Measured, sae_id: str) -> torch.Tensor:
        """attribution_i(t) (|C|, m), float64."""
        reading, rows = m.readings[sae_id], self.by_id[sae_id].reader.rows.double()
        return reading.f.double() * ((m.grads[sae_id].double() @ rows.T) * reading.scale.double())

    def sae_sums(self, m: Measured, sae_id: str) -> dict:
        """One entry of saes[]."""
        reading = m.readings[sae_id]
        out = {"sae": sae_id, "attribution_sum": None, "error_attribution": None, "bias_attribution": None,
               "baseline_reward": None, "residual": None,
               "l0_mean": np.float32((reading.f != 0).sum(dim=1).double().mean().item())}
        if m.grads is None:
            return out
        g = m.grads[sae_id].double()
        attribution = self.attributions(m, sae_id).sum().item()
        error = ((m.x[sae_id].double() - reading.x_hat.double()) * g).sum().item()
        out["attribution_sum"] = np.float32(attribution)
        out["error_attribution"] = np.float32(error)
        out["bias_attribution"] = np.float32((reading.bias.double() * g).sum().item())
        if sae_id in m.baselines:
            out["baseline_reward"] = m.baselines[sae_id]
            out["residual"] = np.float32(float(m.reward) - float(m.baselines[sae_id]) - (attribution + error))
        return out


def spurious(catalogue: dict[Key, Feature], roles: tuple[str, ...], families: list[str] | None = None) -> frozenset:
    """Spurious features of the given roles, of any of the families (None: whatever their families)."""
    return frozenset(
        key for key, f in catalogue.items()
        if f.verdict == "spurious" and f.role in roles and (families is None or set(families) & set(f.families)))
