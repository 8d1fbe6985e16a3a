"""`pytest -p tests.npu_stand_in.plugin`: the process has the device "npu" before any test is imported."""

from tests.npu_stand_in.device import register

register()
