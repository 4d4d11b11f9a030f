"""What ``ps`` says of a VM once its monitor has answered, for which it waits a second only."""

from __future__ import annotations

from stillframe import api
from stillframe.doctor.survey import SurveyedVm
from tests.support.waiting import wait_until


def surveyed(name: str) -> SurveyedVm:
    """The VM of this name."""
    found: list[SurveyedVm] = []

    def answered() -> bool:
        found[:] = [vm for vm in api.survey() if vm.name == name]
        return found[0].version is not None

    wait_until(answered, f"{name} does not answer")
    return found[0]
