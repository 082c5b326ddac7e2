"""Programs of an episode in the sandbox: what comes back as text, and failures that are not the policy's.

Next: ../../rewards/sandbox.py.
"""

from posttrain.rewards import bubblewrap
from posttrain.rewards.sandbox import Limits, Outcome, Program, Sandbox, SandboxMissing
from posttrain.rollouts.environment import Unavailable


def sandbox() -> Sandbox:
    """The sandbox of this process; raises Unavailable where this machine cannot isolate code."""
    try:
        return bubblewrap.shared()
    except SandboxMissing as error:
        raise Unavailable(str(error)) from error


def run(program: Program, limits: Limits) -> Outcome:
    """What became of the program; raises Unavailable if the sandbox is missing or has failed."""
    outcome = sandbox().run(program, limits)
    if outcome.status == "error":
        raise Unavailable(f"the sandbox failed: {outcome.note}")
    return outcome


def report(outcome: Outcome) -> str:
    """What the program wrote, and how it ended where that was not well."""
    ended = "" if outcome.status == "ok" else f"[{outcome.status}{': ' * bool(outcome.note)}{outcome.note}]"
    return "\n".join(filter(None, (outcome.stdout.rstrip(), outcome.stderr.rstrip(), ended))) or "(no output)"
