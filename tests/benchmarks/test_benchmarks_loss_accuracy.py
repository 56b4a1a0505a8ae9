"""The accuracy table: small errors where weights are small, and cancellation seen."""

from benchmarks import loss_accuracy


def test_errors_grow_with_the_weights(monkeypatch):
  monkeypatch.setattr(loss_accuracy, "SCALES", (20.0,))
  near, far = loss_accuracy.errors(1.0), loss_accuracy.errors(50.0)
  assert max(near.values()) < 1e-5
  assert far["dense"] < 1e-4 < far["streaming"] < 1e-1
  assert "| 50 |" in loss_accuracy.table({50.0: far})
