"""What the virtual world and its scripted expert promise to the virtual cell and to the training recipe."""

from __future__ import annotations

import numpy as np
import pytest
import simplejpeg

from device.scripted_expert import Kinematics, ScriptedExpert
from device.virtual_world import (
    CUBE_REGION_M,
    CUBE_SIDE_M,
    HOME_RAD,
    JOINT_RANGE_RAD,
    JOINTS,
    Progress,
    VirtualWorld,
    rad_from_units,
    units_from_rad,
)
from export.recipes.virtual_pick.collect import FRAME_HZ, record

ON = np.ones(6, dtype=bool)
CONTROL_HZ = 60


@pytest.fixture(scope="module")
def kinematics() -> Kinematics:
    return Kinematics()


def perform(world: VirtualWorld, expert: ScriptedExpert, until: Progress | None, limit_s: float = 12.0) -> np.ndarray:
    """Let the expert work, at the control rate, until a stage is reached or its plan is over. Returns the goals."""
    goals = []
    for tick in range(int(limit_s * CONTROL_HZ)):
        goals.append(expert.goal(tick / CONTROL_HZ, world))
        while world.time_s < (tick + 1) / CONTROL_HZ - world.timestep_s / 2:
            world.step(rad_from_units(goals[-1]), ON)
        if world.progress() is until or (until is None and expert.phase(tick / CONTROL_HZ) == "rest"):
            break
    return np.array(goals)


def test_the_same_seed_and_set_points_give_the_same_states_bit_for_bit() -> None:
    def states() -> np.ndarray:
        world = VirtualWorld()
        world.reset(7)
        out = []
        for i in range(300):
            world.step(HOME_RAD + 0.2 * np.sin(i / 50), ON)
            out.append(world.state())
        return np.array(out)

    assert np.array_equal(states(), states())


def test_the_seed_places_the_cube_and_places_differ() -> None:
    world = VirtualWorld()
    places = []
    for seed in range(200):
        world.reset(seed)
        places.append(world.cube_position_m[:2])
    low, high = CUBE_REGION_M.T
    assert np.all((places >= low) & (places <= high))
    assert np.all(np.ptp(places, axis=0) > 0.9 * (high - low))


def test_scattering_moves_the_cube_and_nothing_else() -> None:
    world, fresh = VirtualWorld(), VirtualWorld()
    world.reset(1)
    fresh.reset(42)
    for _ in range(50):
        world.step(HOME_RAD + 0.1, ON)
    time_s, arm = world.time_s, world.position_rad
    world.scatter(42)
    assert np.array_equal(world.cube_position_m, fresh.cube_position_m)
    assert np.array_equal(world.position_rad, arm)
    assert world.time_s == time_s


def test_units_are_degrees_and_hundredths_of_the_grippers_way() -> None:
    units = units_from_rad(JOINT_RANGE_RAD.T)
    assert units[:, :5] == pytest.approx(np.degrees(JOINT_RANGE_RAD.T[:, :5]))
    assert units[:, 5] == pytest.approx([0.0, 100.0])
    assert rad_from_units(units) == pytest.approx(JOINT_RANGE_RAD.T)
    assert len(JOINTS) == 6


@pytest.mark.parametrize("seed", range(6))
def test_the_expert_puts_the_cube_into_the_tray_within_nine_seconds(seed: int, kinematics: Kinematics) -> None:
    world = VirtualWorld()
    world.reset(seed)
    goals = perform(world, ScriptedExpert(kinematics), until=None)
    assert world.done
    assert len(goals) / CONTROL_HZ < 9.0


def test_the_experts_goals_stay_within_the_guards_speed_and_acceleration(kinematics: Kinematics) -> None:
    world = VirtualWorld()
    world.reset(11)
    goals = perform(world, ScriptedExpert(kinematics), until=None)
    speed = np.diff(goals, axis=0) * CONTROL_HZ
    acceleration = np.diff(speed, axis=0) * CONTROL_HZ
    assert np.abs(speed).max() < 90.0
    assert np.abs(acceleration).max() < 500.0


def test_the_expert_plans_anew_when_the_cube_is_moved(kinematics: Kinematics) -> None:
    world, expert = VirtualWorld(), ScriptedExpert(kinematics)
    world.reset(3)
    moved = False
    for tick in range(12 * CONTROL_HZ):
        if not moved and tick == CONTROL_HZ:
            world.place_cube([0.24, 0.05], 0.1)
            moved = True
        goal = expert.goal(tick / CONTROL_HZ, world)
        while world.time_s < (tick + 1) / CONTROL_HZ - world.timestep_s / 2:
            world.step(rad_from_units(goal), ON)
        if world.done:
            break
    assert world.done


def test_the_gripper_holds_the_cube_by_contact_for_as_long_as_it_is_closed(kinematics: Kinematics) -> None:
    world, expert = VirtualWorld(), ScriptedExpert(kinematics)
    world.reset(5)
    goals = perform(world, expert, until=Progress.LIFTED)
    hold = rad_from_units(goals[-1])
    for _ in range(int(5 / world.timestep_s)):
        world.step(hold, ON)
    assert world.progress() is Progress.LIFTED
    assert np.linalg.norm(world.cube_position_m - world.grasp_point_m) < CUBE_SIDE_M / 2
    assert 0.02 < abs(world.effort[JOINTS.index("gripper")]) < 0.25


def test_the_cube_falls_when_the_gripper_opens(kinematics: Kinematics) -> None:
    world, expert = VirtualWorld(), ScriptedExpert(kinematics)
    world.reset(5)
    hold = rad_from_units(perform(world, expert, until=Progress.LIFTED)[-1])
    opened = hold.copy()
    opened[5] = 0.9
    for _ in range(500):
        world.step(opened, ON)
    assert world.cube_position_m[2] < CUBE_SIDE_M


def test_without_torque_the_arm_sinks_and_with_torque_it_holds() -> None:
    world = VirtualWorld()
    stretched = np.radians([0.0, 0.0, 0.0, 0.0, 0.0, 10.0])
    world.reset(1, home_rad=stretched)
    for _ in range(1000):
        world.step(stretched, ON)
    assert world.position_rad == pytest.approx(stretched, abs=np.radians(0.3))
    assert np.abs(world.effort).max() <= 1.0
    for _ in range(1000):
        world.step(stretched, ~ON)
    assert np.degrees(np.abs(world.position_rad - stretched)).max() > 15
    assert world.effort == pytest.approx(np.zeros(6))


def test_effort_in_free_motion_is_small_at_whatever_phase_of_the_goals_it_is_read(kinematics: Kinematics) -> None:
    world, expert, efforts = VirtualWorld(), ScriptedExpert(kinematics), []
    world.reset(4)
    for tick in range(5 * CONTROL_HZ):
        goal = rad_from_units(expert.goal(tick / CONTROL_HZ, world))
        while world.time_s < (tick + 1) / CONTROL_HZ - world.timestep_s / 2:
            world.step(goal, ON)
            efforts.append(world.effort)
    assert np.abs(efforts).max() < 0.7


def test_effort_of_a_blocked_joint_reaches_stall() -> None:
    world = VirtualWorld()
    world.reset(0)
    into_the_table = np.radians([0.0, 60.0, 20.0, 85.0, 0.0, 10.0])
    for _ in range(1000):
        world.step(into_the_table, ON)
    assert np.abs(world.effort).max() > 0.95


def test_one_joint_may_lose_torque_alone() -> None:
    world = VirtualWorld()
    world.reset(1)
    torque = ON.copy()
    torque[JOINTS.index("elbow_flex")] = False
    for _ in range(500):
        world.step(HOME_RAD, torque)
    assert world.effort[JOINTS.index("elbow_flex")] == 0
    assert world.position_rad[0] == pytest.approx(HOME_RAD[0], abs=0.01)


def test_a_picture_of_a_published_state_equals_one_of_the_living_world() -> None:
    live, other = VirtualWorld(), VirtualWorld()
    live.reset(2)
    other.reset(9)
    for i in range(200):
        live.step(HOME_RAD + 0.3 * np.sin(i / 60), ON)
    other.set_state(live.state())
    for camera in VirtualWorld.CAMERAS:
        mine, theirs = live.render(camera), other.render(camera)
        assert mine.shape == (*live.image_hw, 3)
        assert mine.dtype == np.uint8
        assert np.array_equal(mine, theirs)
    live.close()
    other.close()


def test_a_state_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="numbers"):
        VirtualWorld().set_state(np.zeros(3))


def test_both_cameras_see_the_cube_at_no_less_than_six_pixels() -> None:
    world = VirtualWorld()
    for seed in range(8):
        world.reset(seed)
        picture = world.render("front").astype(int)
        red = (picture[..., 0] > 110) & (picture[..., 1] < 70) & (picture[..., 2] < 70)
        rows, columns = np.nonzero(red)
        assert np.ptp(columns) + 1 >= 6
        assert np.ptp(rows) + 1 >= 6
    world.close()


def test_a_recorded_demonstration_holds_pictures_joints_and_clean_goals_at_thirty_hertz(kinematics: Kinematics) -> None:
    world = VirtualWorld(image_hw=(32, 32))
    episode = record(world, kinematics, seed=100_000)
    world.close()
    assert episode is not None
    assert len(episode.jpegs) == len(VirtualWorld.CAMERAS) * len(episode.state)
    assert len(episode.action) == len(episode.state) > 5 * FRAME_HZ
    assert simplejpeg.decode_jpeg(episode.jpegs[0]).shape == (32, 32, 3)
    steps = np.abs(np.diff(episode.action, axis=0)) * FRAME_HZ
    assert steps.max() < 90.0  # the disturbance is in what the arm was told, not in what the policy learns
