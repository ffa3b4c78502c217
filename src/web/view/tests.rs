//! What holds for every page: names cannot become markup, live areas exist, nothing is inline, every icon is in the sprite.

use super::*;
use std::{fs, path::Path};

const HOSTILE: &str = "<img src=x onerror=alert(1)>\"'";

fn chrome() -> Chrome {
    let who = Who { name: HOSTILE.into(), role: "administrator", administrator: true, operator: true };
    Chrome { user: Some(who), csrf: "token".into(), host: HOSTILE.into(), running_tasks: 2, ..Chrome::default() }
}

fn then() -> Moment {
    Moment::new(0, 61_000)
}

fn all_actions() -> Actions {
    let yes = true;
    Actions {
        suspend: true,
        memory: true,
        plug: true,
        discard: false,
        start: yes,
        shutdown: yes,
        power_off: yes,
        reset: yes,
        pause: yes,
        resume: yes,
        edit: yes,
        cd: yes,
        delete: yes,
        console_input: yes,
    }
}

fn starts() -> Vec<Choice> {
    vec![Choice { value: HOSTILE.into(), label: HOSTILE.into() }]
}

fn gauge() -> Gauge {
    Gauge { label: "CPU", words: HOSTILE.into(), share: Percent::of(1, 3), history: vec![1, 2, 3] }
}

fn line(state: State) -> GuestLine {
    GuestLine {
        id: "g1".into(),
        name: HOSTILE.into(),
        note: HOSTILE.into(),
        state,
        reason: Some(HOSTILE.into()),
        since: Some(then()),
        address: Some(HOSTILE.into()),
        cpus: 1,
        memory: Bytes(16 << 20),
        cpu: Some(gauge()),
        actions: all_actions(),
        starts: starts(),
    }
}

fn head(state: State) -> GuestHead {
    GuestHead {
        id: "g1".into(),
        name: HOSTILE.into(),
        tab: GuestTab::Overview,
        state,
        reason: Some(HOSTILE.into()),
        since: Some(then()),
        address: Some(HOSTILE.into()),
        actions: all_actions(),
        starts: starts(),
        resizes: true,
    }
}

fn happened() -> EventLine {
    let subject = Some((HOSTILE.into(), "/guests/g1".into()));
    EventLine { at: then(), level: Level::Degraded, text: HOSTILE.into(), subject, who: Some(HOSTILE.into()) }
}

fn task(state: TaskState) -> TaskLine {
    TaskLine {
        id: "t1".into(),
        title: HOSTILE.into(),
        subject: Some((HOSTILE.into(), "/images".into())),
        who: HOSTILE.into(),
        state,
        step: HOSTILE.into(),
        done: None,
        started: then(),
        ended: Some(then()),
        error: Some(HOSTILE.into()),
        can_cancel: true,
    }
}

fn disks() -> Vec<DiskLine> {
    let label = "Disk 1".into();
    vec![DiskLine {
        id: "d1".into(),
        label,
        size: Bytes(1),
        used: Some(Bytes(1)),
        bus: "virtio".into(),
        note: HOSTILE.into(),
        removable: true,
        limit: Some([HOSTILE.into(), HOSTILE.into()]),
    }]
}

fn overview(state: State) -> GuestPage {
    let facts = vec![Fact { label: "MAC address", value: HOSTILE.into(), copy: true }];
    let (gauges, events) = (vec![gauge()], vec![happened()]);
    let words = HOSTILE.to_owned();
    GuestPage {
        chrome: chrome(),
        guest: head(state),
        words,
        facts,
        disks: disks(),
        cd: Some(HOSTILE.into()),
        gauges,
        events,
        obstacle: None,
    }
}

/// The pages with most in them, rendered, with what each sends while it is open.
fn pages() -> Vec<(String, String)> {
    fn both(page: &(impl Template + Live)) -> (String, String) {
        (page.render().unwrap(), page.fragments().unwrap())
    }
    let states = [State::Running, State::Starting, State::Paused, State::Stopped, State::Failed, State::Unknown];
    let guests: Vec<GuestLine> = states.map(line).to_vec();
    let need = Need { level: Level::Missing, text: HOSTILE.into(), button: HOSTILE.into(), path: "/host".into() };
    let tasks = vec![task(TaskState::Running), task(TaskState::Failed)];
    let image = ImageLine {
        id: "i1".into(),
        name: HOSTILE.into(),
        kind: ImageKind::Cd,
        ready: true,
        size: Bytes(1),
        sha256: Some(HOSTILE.into()),
        added: then(),
        used_by: vec![HOSTILE.into()],
        origin: HOSTILE.into(),
        task: None,
    };
    let fields =
        ImageFields { name: HOSTILE.into(), url: HOSTILE.into(), sha256: HOSTILE.into(), path: HOSTILE.into() };
    let images = vec![image.clone(), ImageLine { used_by: vec![], ..image }];
    let mut errors = FieldErrors::default();
    errors.add("url", HOSTILE);
    let log = vec![LogLine { at: then(), text: HOSTILE.into() }];
    vec![
        both(&HomePage {
            chrome: chrome(),
            needs: vec![need],
            gauges: vec![gauge()],
            guests: guests.clone(),
            tasks: tasks.clone(),
            events: vec![happened()],
        }),
        both(&GuestsPage { chrome: chrome(), query: HOSTILE.into(), guests, obstacle: None }),
        both(&overview(State::Running)),
        both(&overview(State::Failed)),
        both(&GuestLogPage { chrome: chrome(), guest: head(State::Stopped), text: HOSTILE.into(), left_out: Bytes(1) }),
        both(&ImagesPage { chrome: chrome(), images, free: Bytes(1), open_form: "fetch", errors, fields }),
        both(&TasksPage { chrome: chrome(), tasks }),
        both(&TaskPage { chrome: chrome(), task: task(TaskState::Running), log }),
    ]
}

#[test]
fn no_name_becomes_markup() {
    for (page, fragments) in pages() {
        assert!(!page.contains("<img src=x") && !fragments.contains("<img src=x"), "{page}");
        assert!(page.contains("&#60;img src=x onerror=alert(1)&#62;&#34;&#39;"), "the name is shown as it is");
    }
}

#[test]
fn every_live_area_is_on_its_page_once() {
    for (page, fragments) in pages() {
        for target in fragments.split("hx-target=\"#").skip(1).filter_map(|rest| rest.split('"').next()) {
            assert_eq!(page.matches(&format!(" id=\"{target}\"")).count(), 1, "{target}");
            assert!(fragments.contains(&format!(" id=\"{target}\"")), "the fragment for {target} brings its id along");
        }
    }
}

#[test]
fn every_form_that_posts_carries_the_token() {
    for (page, _) in pages() {
        for form in page.split("<form ").skip(1).filter(|form| form.starts_with("method=\"post\"")) {
            let form = form.split("</form>").next().unwrap_or(form);
            assert!(form.contains("name=\"csrf\" value=\"token\""), "{form}");
        }
    }
}

#[test]
fn every_icon_is_in_the_sprite() {
    let list = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("static/icons.txt")).unwrap();
    let sprite = format!("{}#", crate::web::assets::asset("icons.svg"));
    for (page, _) in pages() {
        for name in page.split(&sprite).skip(1).filter_map(|rest| rest.split('"').next()) {
            assert!(list.lines().any(|line| line == name), "icons.txt lacks {name}");
        }
    }
}

/// The content security policy allows neither inline style nor inline script.
#[test]
fn no_template_has_anything_inline() {
    fn check(folder: &Path) {
        for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                check(&entry);
                continue;
            }
            let text = fs::read_to_string(&entry).unwrap();
            for wrong in [" style=", "<style", "<script>", " onclick=", " onsubmit=", "javascript:", "hx-on"] {
                assert!(!text.contains(wrong), "{} has {wrong}", entry.display());
            }
        }
    }
    check(&Path::new(env!("CARGO_MANIFEST_DIR")).join("templates"));
}

#[test]
fn an_event_carries_every_line_and_no_other_field() {
    assert_eq!(event(7, "<p>a\r\nevent: x\r\n\n</p>\n"), "id: 7\ndata: <p>a\ndata: event: x\ndata: \ndata: </p>\n\n");
}

#[test]
fn a_field_has_its_first_error() {
    let mut errors = FieldErrors::default();
    errors.add("name", "is taken");
    errors.add("name", "is long");
    assert_eq!((errors.of("name"), errors.of("cpus")), (Some("is taken"), None));
}
