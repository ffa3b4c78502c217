//! Tasks: list, page, cancel, API.

use actix_web::{HttpResponse, http::StatusCode, web};
use serde::Serialize;

use super::{
    State,
    guard::{Caller, Operator, Viewer},
    page::{html, see_other},
    view::{Bytes, Chrome, LogLine, Moment, Percent, Span, Tab, TaskLine, TaskPage, TaskState as Shown, TasksPage},
};
use crate::{
    error::{Error, Result},
    store::{
        tasks::{LogRow, TaskRow, TaskState},
        users::Role,
    },
    types::{Id, now_ms},
};

pub fn routes(app: &mut web::ServiceConfig) {
    app.route("/tasks", web::get().to(list))
        .route("/tasks/{id}", web::get().to(one))
        .route("/tasks/{id}/cancel", web::post().to(cancel))
        .route("/api/v1/tasks", web::get().to(api_list))
        .route("/api/v1/tasks/{id}", web::get().to(api_get))
        .route("/api/v1/tasks/{id}/cancel", web::post().to(api_cancel));
}

pub async fn tasks_page(state: &State, who: &Caller, chrome: Chrome) -> Result<TasksPage> {
    let tasks = state.tasks.list().await?.into_iter().map(|row| line(row, who)).collect();
    Ok(TasksPage { chrome, tasks })
}

pub async fn task_page(state: &State, who: &Caller, chrome: Chrome, id: &Id) -> Result<TaskPage> {
    let (row, log) = state.tasks.get(id).await?;
    let now = now_ms();
    let log = log.into_iter().map(|line| LogLine { at: Moment::new(line.at_ms, now), text: line.text }).collect();
    Ok(TaskPage { chrome, task: line(row, who), log })
}

/// A task as lists show it.
pub fn line(row: TaskRow, who: &Caller) -> TaskLine {
    let now = now_ms();
    let running = row.state == TaskState::Running;
    TaskLine {
        step: if running { words(&row, now) } else { row.step.clone() },
        done: row.total.filter(|_| running).map(|total| Percent::of(row.done, total)),
        state: match row.state {
            TaskState::Running => Shown::Running,
            TaskState::Done => Shown::Done,
            TaskState::Failed => Shown::Failed,
            TaskState::Cancelled => Shown::Cancelled,
            TaskState::Interrupted => Shown::Interrupted,
        },
        subject: subject(&row.subject),
        started: Moment::new(row.started_ms, now),
        ended: row.ended_ms.map(|at| Moment::new(at, now)),
        can_cancel: running && who.role >= Role::Operator,
        id: row.id.to_string(),
        title: row.title,
        who: row.who,
        error: row.error,
    }
}

/// "Fetching: 1.2 GiB of 3.4 GiB, 84 MiB/s, 25 s left".
fn words(row: &TaskRow, now: i64) -> String {
    if row.done == 0 {
        return row.step.clone();
    }
    let mut words = match row.total {
        Some(total) => format!("{}: {} of {}", row.step, Bytes(row.done), Bytes(total)),
        None => format!("{}: {}", row.step, Bytes(row.done)),
    };
    let seconds = u64::try_from(now - row.started_ms).unwrap_or(0) / 1000;
    if let Some(rate) = row.done.checked_div(seconds).filter(|rate| *rate > 0) {
        words += &format!(", {}/s", Bytes(rate));
        if let Some(left) = row.total.and_then(|total| total.checked_sub(row.done)) {
            words += &format!(", {} left", Span { seconds: left / rate });
        }
    }
    words
}

/// Label and path of what a task works on.
fn subject(path: &str) -> Option<(String, String)> {
    let label = match path.strip_prefix("/guests/") {
        Some(guest) => guest,
        None if path == "/images" => "Images",
        None => return None,
    };
    Some((label.to_owned(), path.to_owned()))
}

fn task_id(text: &str) -> Result<Id> {
    text.parse().map_err(|_| Error::not_found("There is no such task."))
}

async fn list(state: web::Data<State>, who: Viewer) -> Result<HttpResponse> {
    html(StatusCode::OK, &tasks_page(&state, &who, state.chrome(&who, Tab::Tasks)).await?)
}

async fn one(state: web::Data<State>, who: Viewer, id: web::Path<String>) -> Result<HttpResponse> {
    let id = task_id(&id)?;
    html(StatusCode::OK, &task_page(&state, &who, state.chrome(&who, Tab::Tasks), &id).await?)
}

async fn cancel(state: web::Data<State>, _: Operator, id: web::Path<String>) -> Result<HttpResponse> {
    let id = task_id(&id)?;
    state.tasks.cancel(&id).await?;
    Ok(see_other(&format!("/tasks/{id}")))
}

#[derive(Serialize)]
struct ApiTask {
    #[serde(flatten)]
    task: TaskRow,
    log: Vec<LogRow>,
}

async fn api_list(state: web::Data<State>, _: Viewer) -> Result<HttpResponse> {
    Ok(HttpResponse::Ok().json(state.tasks.list().await?))
}

async fn api_get(state: web::Data<State>, _: Viewer, id: web::Path<String>) -> Result<HttpResponse> {
    let (task, log) = state.tasks.get(&task_id(&id)?).await?;
    Ok(HttpResponse::Ok().json(ApiTask { task, log }))
}

async fn api_cancel(state: web::Data<State>, _: Operator, id: web::Path<String>) -> Result<HttpResponse> {
    state.tasks.cancel(&task_id(&id)?).await?;
    Ok(HttpResponse::Accepted().finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_said_with_rate_and_rest() {
        let row = TaskRow {
            id: Id::random(),
            kind: "fetch_image".into(),
            title: "Fetch a".into(),
            subject: "/images".into(),
            who: "ada".into(),
            state: TaskState::Running,
            step: "Fetching".into(),
            done: 10 << 20,
            total: Some(30 << 20),
            started_ms: 0,
            ended_ms: None,
            error: None,
        };
        assert_eq!(words(&row, 10_000), "Fetching: 10 MiB of 30 MiB, 1 MiB/s, 20 s left");
        assert_eq!(words(&row, 500), "Fetching: 10 MiB of 30 MiB");
        assert_eq!(words(&TaskRow { total: None, ..row.clone() }, 10_000), "Fetching: 10 MiB, 1 MiB/s");
        assert_eq!(words(&TaskRow { done: 0, ..row }, 10_000), "Fetching");
    }
}
