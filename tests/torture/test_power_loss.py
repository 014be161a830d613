"""A shorter version of what `make torture` does about power cuts and failing disks."""

import errno
import sys

import pytest

from tests.torture.power_loss import cut_power, fail_disk

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/fd")


def test_after_a_power_cut_a_run_resumes_from_its_last_checkpoint(tmp_path):
    assert not cut_power(tmp_path / "disks", ranks=1, variants=1)


def test_a_disk_that_fails_at_any_call_is_named_and_spoils_no_checkpoint(tmp_path):
    assert not fail_disk(tmp_path / "disks", errno.ENOSPC, every=3)
