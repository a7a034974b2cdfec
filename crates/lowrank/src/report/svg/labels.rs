//! Where the names of points go, so that they hide neither each other nor the points.
//!
//! Each name tries places on rings around its point and takes the cheapest: what it would cover costs, and so does
//! distance. Names that come early do not know of the later ones, so all choose again a few times.

use std::f64::consts::TAU;

/// Height of a line of text, with some air.
pub(super) const LINE: f64 = 15.0;
/// Distances from a point's middle; beyond the first a line leads to the name.
const RINGS: [f64; 6] = [8.0, 18.0, 30.0, 44.0, 62.0, 84.0];
const DIRECTIONS: usize = 16;
const ROUNDS: usize = 4;

/// A rectangle of the picture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Area {
    pub(super) left: f64,
    pub(super) top: f64,
    pub(super) right: f64,
    pub(super) bottom: f64,
}

impl Area {
    /// A square around a place.
    pub(super) fn around((x, y): (f64, f64), half: f64) -> Self {
        Self {
            left: x - half,
            top: y - half,
            right: x + half,
            bottom: y + half,
        }
    }

    /// How much of `self` lies in `other`, in square pixels.
    pub(super) fn overlap(&self, other: &Self) -> f64 {
        let width = self.right.min(other.right) - self.left.max(other.left);
        let height = self.bottom.min(other.bottom) - self.top.max(other.top);
        width.max(0.0) * height.max(0.0)
    }

    /// The place of the rectangle that is nearest to another place.
    fn nearest(&self, (x, y): (f64, f64)) -> (f64, f64) {
        (
            x.clamp(self.left, self.right),
            y.clamp(self.top, self.bottom),
        )
    }
}

/// The place of a name.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) area: Area,
    /// Where a line from the point ends, if the name is too far off to be seen as the point's.
    pub(super) leader: Option<(f64, f64)>,
    ring: f64,
}

/// Places for names of the given widths beside points, inside `bounds`. `obstacles` are better left free.
pub(super) fn place(
    points: &[(f64, f64)],
    widths: &[f64],
    obstacles: &[Area],
    bounds: &Area,
) -> Vec<Place> {
    let mut places: Vec<Option<Place>> = vec![None; points.len()];
    for _ in 0..ROUNDS {
        for index in 0..points.len() {
            let cost = |place: &Place| {
                let area = &place.area;
                let own = (area.right - area.left) * (area.bottom - area.top);
                let names = places.iter().enumerate();
                let names: f64 = names
                    .filter(|(other, _)| *other != index)
                    .filter_map(|(_, other)| other.map(|other| area.overlap(&other.area)))
                    .sum();
                let dots: f64 = points
                    .iter()
                    .map(|point| area.overlap(&Area::around(*point, 6.0)))
                    .sum();
                let other: f64 = obstacles.iter().map(|one| area.overlap(one)).sum();
                let outside = own - area.overlap(bounds);
                8.0 * names + 5.0 * dots + 2.0 * other + 20.0 * outside + place.ring
            };
            let best = candidates(points[index], widths[index])
                .min_by(|one, other| cost(one).total_cmp(&cost(other)));
            places[index] = best;
        }
    }
    places.into_iter().flatten().collect()
}

/// Places around a point, the nearest first; of two that cost the same the first is taken: on the right.
fn candidates((x, y): (f64, f64), width: f64) -> impl Iterator<Item = Place> {
    RINGS.iter().enumerate().flat_map(move |(index, ring)| {
        (0..DIRECTIONS).map(move |direction| {
            let angle = direction as f64 / DIRECTIONS as f64 * TAU;
            let (dx, dy) = (angle.cos(), angle.sin());
            // The side or corner of the name that faces the point lies on the ring.
            let (at_x, at_y) = (x + ring * dx, y + ring * dy);
            let left = at_x - width * (1.0 - dx) / 2.0;
            let top = at_y - LINE * (1.0 - dy) / 2.0;
            let area = Area {
                left,
                top,
                right: left + width,
                bottom: top + LINE,
            };
            Place {
                leader: (index > 0).then(|| area.nearest((x, y))),
                area,
                ring: *ring,
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Area = Area {
        left: 0.0,
        top: 0.0,
        right: 400.0,
        bottom: 300.0,
    };

    #[test]
    fn a_lone_name_stands_on_the_right_and_stays_inside() {
        let place_at = |point| place(&[point], &[60.0], &[], &BOUNDS)[0];
        let free = place_at((100.0, 100.0));
        assert_eq!((free.area.left, free.leader), (108.0, None));
        let edge = place_at((395.0, 100.0));
        assert!(edge.area.right <= 400.0, "{edge:?}");
    }

    #[test]
    fn names_of_points_in_one_place_do_not_cover_each_other() {
        let points: Vec<(f64, f64)> = (0..12)
            .map(|i| (200.0 + f64::from(i % 4), 150.0 + f64::from(i / 4)))
            .collect();
        let places = place(&points, &[90.0; 12], &[], &BOUNDS);
        assert_eq!(places.len(), 12);
        for (index, one) in places.iter().enumerate() {
            for other in &places[..index] {
                assert_eq!(one.area.overlap(&other.area), 0.0, "{one:?} {other:?}");
            }
            for point in &points {
                assert!(one.area.overlap(&Area::around(*point, 3.0)) < 1e-9);
            }
        }
        assert!(places.iter().any(|one| one.leader.is_some()));
    }
}
