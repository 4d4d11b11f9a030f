"""Life draws the generation that a computation in Python gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.board.guests.running import RunningGuest

WIDTH, HEIGHT, CELL = 66, 50, 2
ALIVE, DEAD = 0x00FFD166, 0x00112233
WORD = (1 << 64) - 1

World = list[list[int]]


def first_generation(seed: int, density: int, width: int, height: int) -> World:
    state = (seed + 1) * 0x9E3779B97F4A7C15 & WORD
    world = [[0] * width for _ in range(height)]
    for row in world:
        for x in range(width):
            state ^= state << 13 & WORD
            state ^= state >> 7
            state ^= state << 17 & WORD
            row[x] = int((state >> 32) % 100 < density)
    return world


def next_generation(world: World) -> World:
    height, width = len(world), len(world[0])

    def neighbours(x: int, y: int) -> int:
        rows = [world[(y + dy) % height] for dy in (-1, 0, 1)]
        return sum(row[(x + dx) % width] for row in rows for dx in (-1, 0, 1)) - world[y][x]

    return [
        [
            int(neighbours(x, y) == 3 or (world[y][x] and neighbours(x, y) == 2))
            for x in range(width)
        ]
        for y in range(height)
    ]


def generation(number: int, seed: int, density: int) -> World:
    world = first_generation(seed, density, WIDTH // CELL, HEIGHT // CELL)
    for _ in range(number):
        world = next_generation(world)
    return world


def picture_of(world: World) -> list[int]:
    return [
        ALIVE if world[y // CELL][x // CELL] else DEAD for y in range(HEIGHT) for x in range(WIDTH)
    ]


def pixels(guest: RunningGuest) -> list[int]:
    return memoryview(guest.picture()[: WIDTH * HEIGHT * 4]).cast("I").tolist()


@pytest.mark.parametrize("vcpus", [1, 2, 3])
def test_a_generation_is_as_computed(own_guest: Callable[[str], Path], vcpus: int) -> None:
    options = f"cell={CELL} seed=5 density=35 generations=40"
    with RunningGuest(own_guest("life"), options, vcpus=vcpus, display=(WIDTH, HEIGHT)) as guest:
        guest.wait("^life holds generation=40$")
        world = generation(40, 5, 35)
        assert pixels(guest) == picture_of(world)
        alive = sum(map(sum, world))
        assert guest.ask("a", "^AUDIT") == f"AUDIT ok generation=40 alive={alive}"
        # the torus has edges, and there is life there
        assert any(world[0])


def test_hold_and_go_on(own_guest: Callable[[str], Path]) -> None:
    options = f"cell={CELL} rate=50 tick_ms=100"
    with RunningGuest(own_guest("life"), options, vcpus=2, display=(WIDTH, HEIGHT)) as guest:
        guest.wait("^tick 2 generation=[0-9]+ gap_us=[0-9]+$")
        number = int(guest.ask("h", "^life holds").split("=")[1])
        assert pixels(guest) == picture_of(generation(number, 1, 30))
        mark = guest.console.mark()
        guest.wait("^tick", since=mark)
        assert f"generation={number} " in guest.wait("^tick", since=mark)
        guest.console.send("g")
        guest.wait(rf"^tick [0-9]+ generation=(?!{number} )", since=guest.console.mark())
        guest.ask("q", "^life off")
        assert guest.exit_status() == 0


def test_the_audit_finds_a_wrong_pixel(own_guest: Callable[[str], Path]) -> None:
    options = f"cell={CELL} generations=3"
    with RunningGuest(own_guest("life"), options, display=(WIDTH, HEIGHT)) as guest:
        guest.wait("^life holds")
        vram = guest.board.rams[1]
        at = (7 * WIDTH + 9) * 4
        vram.write(at, bytes(b ^ 0xFF for b in vram.read(at, 4)))
        assert guest.ask("a", "^AUDIT").endswith(
            "1 pixels are not as their cells, the first at 9,7"
        )
        guest.console.send("q")
        assert guest.exit_status() == 1


def test_cells_that_do_not_fit(own_guest: Callable[[str], Path]) -> None:
    with RunningGuest(own_guest("life"), "cell=40", display=(WIDTH, HEIGHT)) as guest:
        guest.wait("^life: cell=40 makes 1 x 1 cells")
        assert guest.exit_status() == 2
