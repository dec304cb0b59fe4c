"""The benchmark of inference through two layers."""

import joint_inference
import torch

from deconvnet import DeconvNet, LayerSettings


def test_without_what_layer_2_adds_the_forms_are_layer_1(monkeypatch):
    """A mean of 0, and weights of 1: every code is that of layer 1 with the same threshold."""
    for name, values in (("LAMS", (2.0,)), ("SHIFTS", (0.0,)), ("EPSILONS", (1e9,))):
        monkeypatch.setattr(joint_inference, name, values)
    monkeypatch.setattr(joint_inference, "THRESHOLDS", (1.0, 1.2, 1.5))
    net = DeconvNet([LayerSettings(3, 3, pool=[1, 2, 2]), LayerSettings(2, 3)])
    noisy = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    denoising = joint_inference.Denoising(net, noisy, noisy, 20 / 255)
    found = {(form, with_): image for form, with_, image in denoising.results()}
    forms = {form for form, _ in found}
    assert {"layer 1", "layer 2", "layer 2, target both", "mean", "sum"} <= forms
    for (form, with_), image in found.items():
        assert image.shape == noisy.shape and image.isfinite().all(), form
        if form == "mean" or form.startswith("weights"):
            t = with_.split(",")[0]
            torch.testing.assert_close(image, found["layer 1", t], atol=1e-4, rtol=0)
