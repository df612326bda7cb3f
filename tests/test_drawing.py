import pytest

from mxd.evaluation.drawing import add_legend, figure


@pytest.mark.parametrize("entries", [1, 3, 16])
def test_a_legend_of_any_length_stays_inside_the_figure_and_above_the_panels(entries: int) -> None:
    with figure(8.0, 3.0, title="Title", subtitle="what it is of", legend=True) as drawing:
        axes = drawing.subplots()
        for number in range(entries):
            axes.plot([0, 1], [number, 1], label=f"a line whose number is {number}")
        axes.set_title("Panel")
        before = drawing.get_figheight()
        add_legend(drawing, [axes])
        drawing.draw_without_rendering()
        legend, panel = drawing.legends[0].get_window_extent(), axes.get_tightbbox()
        title, subtitle = drawing.texts
        assert len(drawing.legends) == 1
        assert legend.x1 < 8 * drawing.dpi
        assert panel is not None
        assert panel.y1 < legend.y0 < legend.y1 < subtitle.get_window_extent().y0
        assert title.get_window_extent().y1 < drawing.get_figheight() * drawing.dpi
        assert (drawing.get_figheight() > before) == (entries == 16)
